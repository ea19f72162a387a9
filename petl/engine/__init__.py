"""What makes frozen training safe to interrupt and pleasant to watch: checkpoints, callbacks, loggers, the CLI."""
