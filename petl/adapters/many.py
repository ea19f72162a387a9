"""Several adapters on one frozen backbone: switched by name, or side by side in one batch.

One adapter at a time is mounted, that is, works inside the backbone; a switch takes it off and mounts another one
(milliseconds: all modules and heads stay in memory, and the fingerprint is taken once). Adapters of methods beside the
network (linear probe, ladder side-tuning) need no mounting: any number of them read one pass of the frozen backbone,
block by block as it goes (petl/backbones/taps.py), so that no block output is kept for them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor, nn

from petl.adapters import rebuild
from petl.adapters.predictor import Picture, Prediction, Predictor
from petl.adapters.state import set_trained_tensors, trained_tensors
from petl.backbones import view
from petl.backbones.base import BackboneView
from petl.backbones.classifier import Classifier
from petl.backbones.identity import Identity
from petl.backbones.taps import Reader, Taps
from petl.errors import PetlError, nearest
from petl.methods.attach import merge, mount, remove
from petl.methods.base import MethodModule

Config = dict[str, Any]
Rows = Tensor | slice


class AdapterSet:
    """Adapters of one frozen backbone by name. ``petl.load([directory, …])`` or ``petl.load({name: directory, …})``.

    What "exact" means here, for the same backbone, device and dtype:

    - ``use(name)`` and then ``logits(x)``: bit for bit what ``petl.load(directory).model(x)`` gives in inference mode.
    - `all_logits`: the same for head-only adapters; for ladders within 1e-5 in fp32 (the blocks run as the library
      wrote them and not in halves, and of the last side block only the tokens that are pooled).
    - a batch whose rows have different adapters: each row gets the operations of its adapter alone, in a batch of the
      rows that share it; equal up to rounding, which in matrix products depends on the number of rows (1e-5 in fp32).

    It is for inference; gradients are not recorded. Threads may share it: their passes take turns, and `use` changes
    the active adapter for all of them, so threads that want different ones take `predictor` or ``adapters=``. Work
    through these methods: ``backbone`` itself is as the latest pass needed it, until `merge` or `release`.
    """

    def __init__(self, backbone: nn.Module, identity: Identity) -> None:
        self.backbone = backbone.eval()
        self._view, self._identity = view(backbone), identity
        self._taps = Taps(self._view)
        self._members: dict[str, _Member] = {}
        self._heads = {n: backbone.get_submodule(n) for n in self._view.head_names if hasattr(backbone, n)}
        self._lock = threading.RLock()
        self._active = ""
        self._mounted: str | None = None
        self._merged: str | None = None
        self._unmerged: dict[str, Tensor | None] = {}  # what `merge` changed, as it was; None = it was not there

    @property
    def names(self) -> list[str]:
        return list(self._members)

    @property
    def active(self) -> str:
        """The adapter that `use` chose; at first the first one."""
        return self._active

    @property
    def labels(self) -> list[str] | None:
        """Class names of the active adapter."""
        return self._members[self._active].labels

    def use(self, name: str) -> AdapterSet:
        """Switch method, head, labels and preprocessing to those of ``name``, together."""
        with self._lock:
            self._mount(self._reachable(name))
            self._active = name
        return self

    def predictor(self, name: str | None = None) -> Predictor:
        """One adapter (None = the active one) as a `petl.Predictor`, whichever is active when it is called."""
        return self._member(name or self._active)

    def preprocess(self, image: Picture) -> Tensor:
        """One image -> (3, H, W), as the active adapter wants it."""
        return self._members[self._active].preprocess(image)

    @overload
    def classify(self, images: Picture, adapters: str | None = None) -> Prediction: ...  # type: ignore[overload-overlap]  # a str is a Sequence too
    @overload
    def classify(self, images: Sequence[Picture], adapters: str | Sequence[str] | None = None) -> list[Prediction]: ...
    def classify(
        self, images: Picture | Sequence[Picture], adapters: str | Sequence[str] | None = None
    ) -> Prediction | list[Prediction]:
        """Classify one image, or several.

        Args:
            images: a path or a PIL image, or a sequence of them.
            adapters: the adapter of each image, or one name for all; None = the active one. Each image is prepared as
                its adapter wants it.

        Raises:
            PetlError: an unreadable image, an unknown name, adapters whose images differ in size, or an adapter without
                classes.
        """
        if adapters is None or isinstance(adapters, str):
            return self.predictor(adapters).classify(images)
        batch = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
        members = [self._member(name) for name in self._row_names(len(batch), adapters)]
        self._check_preparation(adapters, ("image_size",))
        x = torch.stack([m.preprocess(image) for m, image in zip(members, batch, strict=True)])
        found = self.logits(x.to(next(self.backbone.parameters()).device), adapters)
        return [m.predictions(row[None])[0] for m, row in zip(members, found, strict=True)]

    @overload
    def logits(self, x: Tensor, adapters: str | None = None) -> Tensor: ...  # type: ignore[overload-overlap]
    @overload
    def logits(self, x: Tensor, adapters: Sequence[str]) -> list[Tensor]: ...
    @torch.inference_mode()
    def logits(self, x: Tensor, adapters: str | Sequence[str] | None = None) -> Tensor | list[Tensor]:
        """Logits of prepared images (B, 3, H, W): (B, K) of one adapter, or a list of B rows (K of its adapter,).

        Rows are grouped by adapter. All groups of methods beside the network share one frozen pass; each other group
        is a pass of its own. Raises `PetlError` as `classify`.
        """
        with self._lock:
            if adapters is None or isinstance(adapters, str):
                return self._alone(adapters or self._active, x)
            names = self._row_names(len(x), adapters)
            groups = {n: torch.tensor([i for i, own in enumerate(names) if own == n]) for n in dict.fromkeys(names)}
            out: list[Tensor] = [x] * len(names)
            for name, found in self._serve(x, groups).items():
                for i, row in zip(groups[name].tolist(), found, strict=True):
                    out[i] = row
            return out

    @torch.inference_mode()
    def all_logits(self, x: Tensor, adapters: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Logits (B, K) of every adapter, or of ``adapters``, for the same prepared images (B, 3, H, W).

        One pass of the frozen backbone serves all methods beside it together; each other method costs a pass.

        Raises:
            PetlError: an unknown name, or adapters that prepare images differently.
        """
        with self._lock:
            names = list(self._members if adapters is None else adapters)
            self._check_preparation(names, ("image_size", "mean", "std", "interpolation", "mode"))
            return self._serve(x, dict.fromkeys(names, slice(None)))

    def merge(self, name: str) -> nn.Module:
        """Fold an adapter into the backbone's weights, where its method has an exact merge.

        Returns the classifier, an ordinary module. Until `unmerge` no other adapter can be used. The backbone is copied
        meanwhile, and of the copy the tensors that the merge changed are kept.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._reachable(name)
            whole = self._members[name].whole
            if self._merged is not None:
                return whole
            self._mount(None)
            before = {n: t.clone() for n, t in self._own_state().items()}
            self._mount(name)
            merge(self.backbone)
            self._mounted = None
            after = self._own_state()
            same = [n for n in after if n in before and torch.equal(after[n], before[n])]
            self._unmerged = {n: before.get(n) for n in (*before, *after) if n not in same}
            self._merged = self._active = name
            return whole

    def unmerge(self) -> None:
        """Undo `merge`: every tensor of the backbone is bit for bit what it was. Raises `PetlError` where none is."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._merged is None:
                raise PetlError("no adapter is merged into this backbone.")
            for name, old in self._unmerged.items():
                path, _, leaf = name.rpartition(".")
                if old is None:  # a bias that the merge had to add
                    setattr(self.backbone.get_submodule(path), leaf, None)
                else:
                    getattr(self.backbone.get_submodule(path), leaf).copy_(old)
            name, self._merged, self._unmerged = self._merged, None, {}
            self._put_heads(self._heads)
            self._mount(name)

    def release(self) -> nn.Module:
        """Take everything off; returns the backbone as it was. The set is of no use afterwards."""
        with self._lock:
            if self._merged is not None:
                self.unmerge()
            self._mount(None)
            self._taps.remove()
        return self.backbone

    # ---- one adapter in the backbone

    def _add(
        self, name: str, directory: Path, config: Config, module: MethodModule, tensors: Mapping[str, Tensor]
    ) -> None:
        member = self._members[name] = _Member(self, name, config, module)
        self._mount(name)
        set_trained_tensors(member.whole, dict(tensors), str(directory))
        member.kept = {n: t.clone() for n, t in member.inside().items()}
        self._mount(None)

    def _mount(self, name: str | None) -> None:
        """Let ``name`` work in the backbone and no other; None = the frozen backbone alone."""
        if name == self._mounted or self._merged is not None:
            return
        with torch.inference_mode(False), torch.no_grad():
            if self._mounted is not None:
                remove(self.backbone)
                self._put_heads(self._heads)
                self._mounted = None
            if name is not None:
                member = self._members[name]
                self._put_heads(member.own)
                try:
                    mount(member.module, self._identity)
                except PetlError:
                    self._put_heads(self._heads)
                    raise
                self._mounted = name
                inside = member.inside() if member.kept else {}
                for path, tensor in member.kept.items():
                    inside[path].copy_(tensor)

    def _put_heads(self, heads: Mapping[str, nn.Module]) -> None:
        for name, module in heads.items():
            setattr(self.backbone, name, module)

    def _own_state(self) -> dict[str, Tensor]:
        """Tensors of the backbone proper, without any head."""
        return {n: t for n, t in self.backbone.state_dict().items() if self._view.is_backbone(n)}

    # ---- passes

    def _alone(self, name: str, x: Tensor) -> Tensor:
        self._mount(self._reachable(name))
        return self._members[name].run(x)

    def _serve(self, x: Tensor, groups: Mapping[str, Rows]) -> dict[str, Tensor]:
        """Logits of some rows of ``x`` for each adapter: one pass for those beside the network, one for each other."""
        for name in groups:
            self._reachable(name)
        self._check_preparation(list(groups), ("image_size",))
        beside = {n: rows for n, rows in groups.items() if self._members[n].beside}
        found = self._one_pass(x, beside) if beside else {}
        return {n: found[n] if n in found else self._alone(n, x[rows]) for n, rows in groups.items()}

    def _one_pass(self, x: Tensor, groups: Mapping[str, Rows]) -> dict[str, Tensor]:
        self._mount(None)
        wanted = [rows for rows in groups.values() if isinstance(rows, Tensor)]
        if wanted:  # run no row that belongs to nobody here
            used = torch.cat(wanted).sort().values
            x = x[used]
            groups = {n: torch.searchsorted(used, r) if isinstance(r, Tensor) else r for n, r in groups.items()}
        first = self._view.pooled_tokens
        readers: dict[str, Reader] = {}
        for name, rows in groups.items():
            reader = self._members[name].module.reader(first)
            if reader is not None:
                readers[name] = _Some(reader, rows) if isinstance(rows, Tensor) else reader
        tokens = (_Latest(),) if readers else ()
        with self._taps.record((*readers.values(), *tokens)) as recording:
            features = self._view.features(x)
        states = dict(zip(readers, recording.states))
        out = {}
        for name, rows in groups.items():
            member, f = self._members[name], features[rows]
            if name in states:
                h = recording.states[-1][rows, :first]
                f = self._view.pool(member.module.last(h, states[name]))
            out[name] = member.classes(f)
        return out

    # ---- checks

    def _member(self, name: str) -> _Member:
        if name not in self._members:
            raise PetlError(f"no adapter {name!r} is loaded: {nearest(name, self._members)}")
        return self._members[name]

    def _reachable(self, name: str) -> str:
        self._member(name)
        if self._merged not in (None, name):
            raise PetlError(
                f"{self._merged!r} is merged into the backbone, so {name!r} cannot use it: unmerge() first."
            )
        return name

    def _row_names(self, rows: int, adapters: Sequence[str]) -> list[str]:
        if len(adapters) != rows:
            raise PetlError(f"adapters= names one adapter for each image: {len(adapters)} names for {rows} images.")
        return [self._member(name).name for name in adapters]

    def _check_preparation(self, names: Sequence[str], keys: tuple[str, ...]) -> None:
        """Raise `PetlError` where the adapters prepare images differently in ``keys``; no record fits all."""
        records = {n: r for n in names if (r := self._member(n).config["preprocessing"]) is not None}
        first = next(iter(records), "")
        for name, record in records.items():
            differing = [f"{k} {records[first].get(k)} and {record.get(k)}" for k in keys
                         if records[first].get(k) != record.get(k)]  # fmt: skip
            if differing:
                raise PetlError(
                    f"{first!r} and {name!r} prepare images differently ({'; '.join(differing)}), so one batch of "
                    "tensors cannot be for both: classify their images apart."
                )


class _Member(Predictor):
    """One adapter of a set: its module, its head, and what it keeps in the backbone itself."""

    def __init__(self, adapters: AdapterSet, name: str, config: Config, module: MethodModule) -> None:
        backbone, head = adapters.backbone, config["head"]
        super().__init__(_Named(adapters, name), config)
        self.adapters, self.name, self.module = adapters, name, module
        self.head = rebuild.classification_head(head).to(next(backbone.parameters()).device).eval() if head else None
        self.whole = Classifier(backbone, self.head) if self.head else backbone
        self.own = _own_heads(module.view, int(config["backbone"].get("own_head_classes") or 0))
        self.kept: dict[str, Tensor] = {}
        self.beside = self.module.beside and (self.head is not None or len(self.own) <= 1)

    @property
    def backbone(self) -> nn.Module:
        return self.adapters.backbone

    def merge(self) -> nn.Module:
        return self.adapters.merge(self.name)

    def inside(self) -> dict[str, Tensor]:
        """Its trained tensors that lie in the backbone proper; while it is mounted."""
        found = {n.removeprefix("backbone."): t for n, t in trained_tensors(self.whole).items() if n[:5] != "head."}
        return {n: t for n, t in found.items() if self.module.view.is_backbone(n)}

    def run(self, x: Tensor) -> Tensor:
        """Logits, or features where it has no head; while it is mounted."""
        if self.head is None and self.own:
            out = self.backbone(x)
            return getattr(out, "logits", out)
        return self.classes(self.module.view.features(x))

    def classes(self, features: Tensor) -> Tensor:
        """Logits of pooled features (B, C), which are the result where there is no head."""
        head = self.head or next(iter(self.own.values()), None)
        return features if head is None else head(features)


class _Named(nn.Module):
    """One adapter of a set as an ordinary module: images (B, 3, H, W) -> logits."""

    def __init__(self, adapters: AdapterSet, name: str) -> None:
        super().__init__()
        self.adapters, self.name, self.backbone = adapters, name, adapters.backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.adapters.logits(x, self.name)


class _Some:
    """A reader of some rows of the batch."""

    def __init__(self, reader: Reader, rows: Tensor) -> None:
        self.reader, self.rows = reader, rows

    def begin(self, h0: Tensor) -> Tensor:
        return self.reader.begin(h0[self.rows])

    def step(self, index: int, z: Tensor, h: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.reader.step(index, z, h[self.rows], keep)


class _Latest:
    """The reader whose state is the output of the latest block."""

    def begin(self, h0: Tensor) -> Tensor:
        return h0

    def step(self, index: int, z: Tensor, h: Tensor, keep: Tensor | None = None) -> Tensor:
        return h


def _own_heads(encoder: BackboneView, classes: int) -> dict[str, nn.Module]:
    """Heads of ``classes`` classes for the places where this network has its own; none where ``classes`` is 0."""
    model = encoder.model
    like = next(model.parameters())
    return {
        name: nn.Linear(encoder.width, classes, device=like.device, dtype=like.dtype).eval()
        for name in encoder.head_names
        if classes and hasattr(model, name)
    }
