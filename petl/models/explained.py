"""A frozen classifier beside which side networks explain it (AutoGnothi)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl.backbones import classifier_view
from petl.backbones.base import BackboneView, EncoderView
from petl.backbones.classifier import Classifier
from petl.backbones.identity import Identity, identify_all
from petl.backbones.players import Players, patch_players, word_players
from petl.backbones.taps import Reader, Rows, Taps, chunked_rows, gathered_rows
from petl.errors import PetlError
from petl.methods.autognothi import AutoGnothi, AutoGnothiModule
from petl.methods.base import MethodModule
from petl.models.recorded import Keeper, Recomputed, Recorded, Untrained
from petl.nn.ladder import FirstTokens, Ladder
from petl.nn.shapley import efficient_normalise

Inputs = Tensor | Mapping[str, Tensor]  # images (B, 3, H, W), or input_ids and attention_mask (B, T)


@dataclass(frozen=True)
class ShapleyExplanation:
    """Prediction and Shapley values of a batch.

    ``logits`` (B, C): of the classifier, as without explanation. ``values`` (B, n, C): share of each player in the sum
    ``grand - null``, zero where an input has fewer than n players. ``null``, ``grand`` (B, C): the game without and
    with all players, probabilities. ``players``: which token belongs to which. ``grid``: (rows, columns) of image
    players.
    """

    logits: Tensor
    values: Tensor
    null: Tensor
    grand: Tensor
    players: Players
    grid: tuple[int, int] | None

    @property
    def efficiency_gap(self) -> Tensor:
        """Largest difference between the sum of the values and ``grand - null``, per input (B,)."""
        return (self.values.sum(1) - (self.grand - self.null)).abs().amax(1)

    def maps(self, classes: Tensor | None = None) -> Tensor:
        """Values of images as maps (B, rows, columns), for ``classes`` (B,) or the predicted ones."""
        if self.grid is None:
            raise PetlError("these players are words, not patches: there is no map of them.")
        chosen = self.logits.argmax(-1) if classes is None else classes
        return self.values.gather(2, chosen[:, None, None].expand(-1, self.values.shape[1], 1)).unflatten(1, self.grid)[
            ..., 0
        ]


class ExplainedClassifier(nn.Module):
    """A classifier that explains itself; ``model(x)`` is bit for bit what the classifier computes.

    Args:
        classifier: a `petl.Classifier` with any method that keeps every token, a timm ViT or HF ViT with its head, or a
            BertForSequenceClassification. It is frozen for ever.
        method: a `petl.AutoGnothi`.
        tokenizer: of a text classifier: says which tokens are no words, and which pieces belong together.

    Raises:
        PetlError: no classifier, a network whose players cannot be removed, or options that do not fit it.
    """

    def __init__(self, classifier: nn.Module, method: AutoGnothi | None = None, tokenizer: Any = None) -> None:
        super().__init__()
        method = method or AutoGnothi()
        if not isinstance(method, AutoGnothi):
            raise PetlError(f"a classifier is explained by petl.AutoGnothi, not by {method!r}.")
        self.view: EncoderView = classifier_view(classifier)
        inner = classifier.backbone if isinstance(classifier, Classifier) else classifier
        adapter = getattr(inner, "petl", None)
        self.adapter = adapter.method if isinstance(adapter, MethodModule) else None
        self._refuse_token_dropping(adapter)
        self.tokenizer = tokenizer
        self._special: tuple[int, ...] = ()
        self._continues: Tensor | None = None
        if not isinstance(self.view, BackboneView):
            self._special, self._continues = _words(tokenizer)
            if method.players or method.removal == "mean":
                raise PetlError(
                    "AutoGnothi(players=…) and removal='mean' are about patches; this classifier reads text."
                )
        self.carried = _trained(classifier, adapter)  # of the classifier, saved with the side networks
        self.petl: AutoGnothiModule = method.build_explainer(self.view, _classes(classifier))
        self._before = (
            [p.requires_grad for p in classifier.parameters()],
            {n: m.training for n, m in classifier.named_modules()},
        )
        self.classifier = classifier.requires_grad_(False).eval()
        self.petl.to(next(classifier.parameters()).device)
        self.taps = Taps(self.view)
        self.checkpointing = True  # keep nothing from inside the side blocks for the backward pass: recompute it there
        self.gather = True  # run only the tokens that are kept, instead of masking the others: the same values, sooner

    def _refuse_token_dropping(self, adapter: Any) -> None:
        if not isinstance(adapter, MethodModule) or not isinstance(self.view, BackboneView):
            return
        patches = 64
        usual, counts = patches + self.view.prefix_tokens, adapter.token_counts(patches)
        if any(max(count) > usual for count in counts):
            raise PetlError(
                f"{adapter.method.name!r} adds tokens inside this classifier, and the side networks read those of the "
                "picture. Explain a classifier that keeps the usual tokens (AdaptFormer, for instance)."
            )
        if any(count != (usual, usual) for count in counts):
            raise PetlError(
                f"{adapter.method.name!r} drops tokens inside this classifier: a dropped patch has no value of its "
                "own, and which patches are dropped changes with every coalition. Explain a classifier that keeps "
                "all tokens (SparseTuning(keep_rate=1.0), for instance)."
            )

    def release(self) -> nn.Module:
        """Take the side networks off; returns the classifier as it was."""
        self.taps.remove()
        flags, training = self._before
        for parameter, flag in zip(self.classifier.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        for name, module in self.classifier.named_modules():
            module.training = training.get(name, module.training)
        return self.classifier

    @property
    def method(self) -> AutoGnothi:
        return self.petl.method

    @property
    def identity(self) -> Identity:
        """Of the whole adapted classifier: backbone, adapter and head."""
        return identify_all(self.view.family, self.classifier.state_dict())

    def train(self, mode: bool = True) -> ExplainedClassifier:
        super().train(mode)
        self.classifier.eval()  # dropout and moving averages stay off
        return self

    def forward(self, x: Inputs) -> Any:
        """What the classifier returns, untouched."""
        return self.classifier(**x) if isinstance(x, Mapping) else self.classifier(x)

    def logits(self, x: Inputs) -> Tensor:
        """(B, C) of the classifier."""
        out = self(x)
        return getattr(out, "logits", out)

    def players(self, x: Inputs | Recorded) -> Players:
        """The players of a batch."""
        if isinstance(x, Mapping):
            if not {"input_ids", "attention_mask"} <= x.keys():
                raise PetlError(f"a text batch has input_ids and attention_mask; this one has {sorted(x)}.")
            pieces = self._continues if self.method.whole_words else None
            return word_players(x["input_ids"], x["attention_mask"], self._special, pieces)
        found = patch_players(x.shape[0], self._patches(x), self.view.prefix_tokens, self.method.players)
        return Players(found.of.to(x.device), found.counts.to(x.device), found.most)

    def _patches(self, x: Tensor | Recorded) -> tuple[int, int]:
        assert isinstance(self.view, BackboneView)
        return self.view.grid((3, *x.shape[-2:]))  # type: ignore[arg-type]

    def grid(self, x: Inputs | Recorded) -> tuple[int, int] | None:
        """Rows and columns of image players."""
        return None if isinstance(x, Mapping) else self.method.players or self._patches(x)

    def link(self, logits: Tensor) -> Tensor:
        """Logits (…, C) -> probabilities, fp32."""
        logits = logits.float()
        return logits.softmax(-1) if self.method.link == "softmax" else logits.sigmoid()

    # ---- the game

    def read(
        self, x: Inputs | Recorded, *readers: Reader, rows: Rows | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the states of ``readers`` after the last block, of one pass of the frozen classifier."""
        if isinstance(x, Recorded):
            return x.logits, [x.replay(reader, self.view.depth) for reader in readers]
        with self.taps.record(readers, rows, keep) as recording:
            logits = self.logits(x)
        return logits, recording.states

    def _trained(self, ladder: Ladder) -> Reader:
        return Recomputed(ladder) if self.checkpointing else ladder

    def reads(self) -> tuple[str, ...]:
        """The taps that the ladders read (see petl/backbones/replay.py)."""
        ladder = self.petl.explainer.ladder
        return (*(("embedded",) if ladder.seed is not None else ()), *(f"block.{i}" for i in ladder.layers))

    def record(self, x: Tensor) -> dict[str, Tensor]:
        """The taps of images (B, 3, H, W) that the ladders read, (B, T, C) each."""
        keeper = Keeper(self.reads())
        self.read(x, keeper)
        return keeper.taps

    def embedded(self, x: Inputs) -> Tensor:
        """The tokens that enter the first block, (B, T, C)."""
        with self.taps.record() as recording:
            self.logits(x)
        assert recording.embedded is not None
        return recording.embedded

    def surrogate_logits(self, x: Inputs, coalition: Tensor) -> Tensor:
        """Surrogate logits (B, C) of one coalition per input, bool (B, n), with a gradient for the side network."""
        surrogate = self.petl.surrogate
        reader = self._trained(surrogate.ladder)
        if self.method.removal == "mean":
            return surrogate(self.read(self._without(x, coalition), reader)[1][0], None)
        keep = self.players(x).keep(coalition[:, None])[:, 0]
        return surrogate(self.read(x, reader, rows=Rows(keep=keep))[1][0], keep)

    @torch.no_grad()
    def values(self, x: Inputs, coalitions: Tensor, players: Players | None = None) -> Tensor:
        """The game v(S): surrogate probabilities (B, K, C) of coalitions, bool (B, K, n), fp32."""
        (batch, count, _), surrogate = coalitions.shape, self.petl.surrogate
        players = players or self.players(x)
        out = torch.empty(batch * count, self.petl.classes, device=coalitions.device)
        if self.method.removal == "mean":
            flat = coalitions.flatten(0, 1)
            for rows in torch.arange(len(flat), device=flat.device).split(64):
                states = self.read(self._without(select(x, rows // count), flat[rows]), surrogate.ladder)[1]
                out[rows] = self.link(surrogate(states[0], None))
            return out.unflatten(0, (batch, count))
        split = gathered_rows if self.gather else chunked_rows
        for where, rows in split(players.keep(coalitions)):
            assert rows.source is not None
            inputs, source = rows.source.unique(return_inverse=True)
            states = self.read(select(x, inputs), surrogate.ladder, rows=rows._replace(source=source))[1]
            out[where] = self.link(surrogate(states[0], rows.keep))
        return out.unflatten(0, (batch, count))

    def null(self, x: Inputs, players: Players | None = None) -> Tensor:
        """v(0): the game without any player (B, C). It is the same for all images of a size."""
        players = players or self.players(x)
        some = slice(0, 1 if isinstance(x, Tensor) else len(players.counts))
        nobody = torch.zeros(some.stop, 1, players.most, dtype=torch.bool, device=players.of.device)
        return self.values(select(x, some), nobody, players.select(some))[:, 0].expand(len(players.counts), -1)

    @torch.no_grad()
    def measure_null(self, x: Inputs) -> None:
        """Keep v(0) of images like ``x``, so that no explanation of them computes it again."""
        if isinstance(x, Tensor):
            self.petl.null.copy_(self.null(x)[0])
            self.petl.knows_null = True

    def _kept_null(self, x: Inputs | Recorded) -> Tensor | None:
        if not self.petl.knows_null or not isinstance(self.view, BackboneView) or isinstance(x, Mapping):
            return None
        return self.petl.null if tuple(x.shape[-2:]) == tuple(self.view.preprocessing["input_size"][1:]) else None

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.classifier.parameters()).dtype

    def _without(self, x: Inputs, coalition: Tensor) -> Tensor:
        """Images whose removed players have the mean colour, which is 0 after normalisation."""
        assert isinstance(x, Tensor)
        rows, columns = self._patches(x)
        players = patch_players(1, (rows, columns), 0, self.method.players).of[0].to(x.device)
        kept = coalition[:, players].unflatten(1, (rows, columns))[:, None].to(x.dtype)
        return x * F.interpolate(kept, size=x.shape[-2:])

    # ---- explanations

    def explain(
        self, x: Inputs | Recorded, null: Tensor | None = None, grand: Tensor | None = None
    ) -> ShapleyExplanation:
        """Prediction and Shapley values from one pass of the classifier; the explainer gets gradients.

        Args:
            x: images (B, 3, H, W), a mapping with input_ids and attention_mask (B, T), or what was recorded of images:
                the same arithmetic, without the pass.
            null, grand: v(0) and v(1) (B, C), where they are known already.
        """
        explainer, surrogate, players = self.petl.explainer, self.petl.surrogate, self.players(x)
        keep = players.everyone() if isinstance(x, Mapping) else None
        reads_surrogate = grand is None and self.method.grand == "surrogate"
        readers = [self._trained(explainer.ladder)]
        if reads_surrogate:
            readers.append(Untrained(FirstTokens(surrogate.ladder, 1 if surrogate.pools_class_token else None)))
        logits, states = self.read(x, *readers, keep=keep)
        raw = players.total(explainer(states[0], keep).float())  # (B, n, C)
        with torch.no_grad():
            if grand is None:
                grand = self.link(surrogate(states[1], keep) if reads_surrogate else logits)
            null = self._kept_null(x) if null is None else null
            if null is None:
                null = self.null(x.blank(self._dtype) if isinstance(x, Recorded) else x, players)
            null = null.expand(len(grand), -1)
        values = efficient_normalise(raw, grand, null, players.valid)
        return ShapleyExplanation(logits, values, null, grand, players, self.grid(x))


@torch.inference_mode()
def explain(model: nn.Module, x: Inputs) -> ShapleyExplanation:
    """Prediction and Shapley values of a trained `petl.ExplainedClassifier` for a batch.

    Args:
        model: see there; ``petl.load(…).model`` of an explanation.
        x: images (B, 3, H, W), normalised, or a mapping with input_ids and attention_mask (B, T).

    Raises:
        PetlError: another model.
    """
    if not isinstance(model, ExplainedClassifier):
        raise PetlError(
            f"petl.explain needs a petl.ExplainedClassifier, not a {type(model).__name__}: wrap a classifier in one "
            "and train its side networks with petl.Explanation."
        )
    return model.explain(x)


def select(x: Inputs, rows: Tensor | slice) -> Inputs:
    """Some inputs of a batch."""
    return {k: v[rows] for k, v in x.items()} if isinstance(x, Mapping) else x[rows]


def _classes(classifier: nn.Module) -> int:
    """Outputs of a classifier's head. Raises `PetlError` where it has none."""
    config = getattr(classifier, "config", None)
    head = classifier.head.num_classes if isinstance(classifier, Classifier) else None
    found = head or getattr(classifier, "num_classes", None) or getattr(config, "num_labels", None)
    if not found:
        raise PetlError("this network has no classification head, so there is no prediction to explain.")
    return int(found)


def _trained(classifier: nn.Module, adapter: Any) -> tuple[str, ...]:
    """Names of the classifier's tensors that belong to its method and its head, not to the frozen backbone."""
    if not isinstance(adapter, MethodModule):
        return ()
    heads = tuple(f"{name}." for name, _ in adapter.view.head_modules())
    prefix = "backbone." if isinstance(classifier, Classifier) else ""
    found: dict[int | str, str] = {}  # by place: layers that share a tensor save it once
    for name, tensor in classifier.state_dict().items():
        inner = name.removeprefix(prefix)
        if adapter.trains_backbone or inner.startswith((*heads, "head.")) or adapter.owns(inner):
            found.setdefault(tensor.data_ptr() or name, name)
    return tuple(found.values())


def _words(tokenizer: Any) -> tuple[tuple[int, ...], Tensor]:
    """Ids that are no words, and which pieces of the vocabulary continue a word ("##ing")."""
    if tokenizer is None:
        raise PetlError("a text classifier is explained with its tokenizer: ExplainedClassifier(…, tokenizer=…).")
    special = {i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id}
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return tuple(sorted(special)), torch.tensor([str(p).startswith("##") for p in pieces])
