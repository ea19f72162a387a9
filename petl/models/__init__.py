"""Networks put together from frozen encoders, a method and a trained head."""
