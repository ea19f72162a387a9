"""Loading several adapters together; those that do not share one frozen backbone are refused before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from petl.adapters import rebuild
from petl.adapters.artefact import read_config, read_tensors
from petl.adapters.many import AdapterSet, Config
from petl.adapters.predictor import locate
from petl.backbones import view
from petl.backbones.identity import identify
from petl.errors import PetlError
from petl.methods.attach import fit
from petl.methods.base import from_dict
from petl.methods.full import FullFineTuning


@torch.inference_mode(False)
def load_set(
    sources: Sequence[str | Path] | Mapping[str, str | Path],
    backbone: Any,
    weights: str | Path | None,
    device: str | torch.device,
) -> AdapterSet:
    """What `petl.load` does for several adapters; see there. Raises `PetlError` before anything heavy is loaded."""
    if not sources:
        raise PetlError("petl.load([]) has no adapter to load.")
    given = dict(sources) if isinstance(sources, Mapping) else dict(zip(short_names(sources), sources, strict=True))
    directories = {name: locate(source) for name, source in given.items()}
    configs = {name: read_config(directory) for name, directory in directories.items()}
    reference = _check_together(directories, configs)
    tensors = {name: read_tensors(directories[name], config) for name, config in configs.items()}
    if isinstance(backbone, tuple):
        raise PetlError("a set of classifiers has one backbone: pass one model, not a pair.")
    if backbone is None:
        named = next((n for n, c in configs.items() if c["backbone"].get("name")), reference)
        backbone = rebuild.load_recorded(directories[named], configs[named]["backbone"], weights)
    modules = {name: fit(backbone, from_dict(config["method"])) for name, config in configs.items()}
    identity = identify(view(backbone))
    rebuild.check_identity(directories[reference], identity, configs[reference]["backbone"])
    adapters = AdapterSet(backbone.to(device), identity)
    try:
        for name, config in configs.items():
            adapters._add(name, directories[name], config, modules[name], tensors[name])
    except PetlError:
        adapters.release()
        raise
    return adapters.use(next(iter(configs)))


def short_names(sources: Sequence[str | Path]) -> list[str]:
    """A name for each adapter: the last folders of its path (not "adapter"), as many as tell them apart."""
    paths = [[p for p in Path(s).parts if p not in ("/", ".", "..")] for s in sources]
    paths = [p[:-1] if len(p) > 1 and p[-1] == "adapter" else p for p in paths]
    apart = len({tuple(p) for p in paths})
    count = next(n for n in range(1, max(map(len, paths)) + 1) if len({tuple(p[-n:]) for p in paths}) == apart)
    names = ["/".join(p[-count:]) for p in paths]
    return [name if (n := names[:i].count(name)) == 0 else f"{name}-{n + 1}" for i, name in enumerate(names)]


def _check_together(directories: Mapping[str, Path], configs: Mapping[str, Config]) -> str:
    """Raise `PetlError` unless all classify on one frozen backbone; returns the name whose record of it says most."""
    for name, config in configs.items():
        if config["task"] not in ("classification", "features"):
            raise PetlError(
                f"{name!r} ({directories[name]}) was trained for {config['task']!r}, and a set holds image classifiers "
                "of one backbone: load it alone."
            )
        if isinstance(from_dict(config["method"]), FullFineTuning):
            raise PetlError(
                f"{name!r} ({directories[name]}) was fully fine-tuned: it carries a backbone of its own, and the "
                "adapters of a set share one frozen backbone. Load it alone."
            )
    records = {n: rebuild.recorded_identity(directories[n], c["backbone"]) for n, c in configs.items()}
    reference = next((n for n, r in records.items() if r.weights), next(iter(records)))
    other = {n: d for n, r in records.items() if (d := records[reference].difference(r))}
    if other:
        stands = "; ".join(f"{n!r} on {d}" for n, d in other.items())
        raise PetlError(
            f"these adapters do not share one frozen backbone. Compared with that of {reference!r} "
            f"({configs[reference]['backbone'].get('name') or 'not named'}): {stands}. Load them one by one."
        )
    return reference
