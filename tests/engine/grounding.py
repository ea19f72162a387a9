"""What the tests of grounding runs share: quick `petl` commands, a tiny pair of encoders on disk, small options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Everything is imported once; each command runs in a fork of that process: a second instead of ten. With ``kill``
# (step, hook, signal) it gets the signal there; with two environments it is two processes of one DDP training.
SERVER = """
import json, os, signal, sys, traceback
import torch
torch.set_num_threads(1)
import matplotlib.backends.backend_agg, matplotlib.figure, timm.models.vision_transformer
import petl.data, petl.adapters.predictor, petl.backbones.detr, petl.backbones.hf_text, petl.pictures, transformers
import petl.engine.adapter_cli, petl.engine.inspect_cli, petl.engine.lightning_cli, petl.engine.prepare_cli
from transformers import AutoTokenizer, BertModel, DetrModel
from petl.cli import main
from petl.tasks.grounding import Grounding

def dying(step, hook, number):
    method = getattr(Grounding, hook)
    def wrapped(self, *a, **k):
        if self.global_step >= step:
            os.kill(os.getpid(), number)
        return method(self, *a, **k)
    setattr(Grounding, hook, wrapped)

def child(job, rank):
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['log']}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(240)
    os.chdir(job["cwd"])
    os.environ.update(job["environments"][rank])
    if job["kill"]:
        dying(*job["kill"])
    sys.argv = ["petl"]
    try:
        return main(job["args"])
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1

for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    children = []
    for rank in range(len(job["environments"])):
        children.append(os.fork())
        if children[-1] == 0:
            code = child(job, rank)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code or 0)
    codes = [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]
    print(json.dumps(codes), flush=True)
os._exit(0)  # without taking apart what was imported
"""


class Petl:
    """``petl("fit", "--config", …)``: the command, in its own process, with what it printed."""

    def __init__(self, server: subprocess.Popen[str], log: Path) -> None:
        self.server, self.log = server, log

    def __call__(
        self,
        *args: object,
        cwd: Path,
        check: bool = True,
        kill: tuple[int, str, int] | None = None,
        environments: tuple[dict[str, str], ...] = ({},),
    ) -> subprocess.CompletedProcess[str]:
        job = {"args": [*map(str, args)], "cwd": str(cwd), "log": str(self.log), "kill": kill}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(job | {"environments": environments}) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the process that runs the commands has ended"
        codes = json.loads(answer)
        out, err = (
            "".join(Path(f"{self.log}.{rank}.{name}").read_text() for rank in range(len(codes)))
            for name in ("out", "err")
        )
        assert not check or codes == [0] * len(codes), f"{args}: {codes}\n{out}{err}"
        return subprocess.CompletedProcess(job["args"], next((c for c in codes if c), 0), out, err)


@contextmanager
def commands() -> Iterator[Petl]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "PL_"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as server,
    ):
        yield Petl(server, Path(folder) / "log")
        assert server.stdin is not None
        server.stdin.close()


QUICK: list[object] = [
    "--trainer.accelerator", "cpu", "--trainer.max_epochs", 1, "--model.fusion_layers", 1, "--model.fusion_dim", 32,
    "--model.fusion_hidden", 32, "--model.head_epochs", 0, "--data.batch_size", 8,
]  # fmt: skip
SCENES: list[object] = [
    "--config", "quickstart/grounding", *QUICK, "--data.train_size", 24, "--data.val_size", 6, "--data.test_size", 7,
    "--data.expressions_per_scene", 2,
]  # fmt: skip


def tiny_pair(folder: Path, words: Path | list[str], width: int = 24, layers: tuple[int, int] = (3, 4)) -> list[object]:
    """A random DETR and BERT with a tokenizer, as `save_pretrained` writes them; the options that name them."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast, DetrConfig, DetrModel, ResNetConfig

    torch.manual_seed(7)
    stem = ResNetConfig(embedding_size=6, hidden_sizes=[6, 8, 8, 8], depths=[1] * 4, layer_type="basic",
                        out_features=["stage4"])  # fmt: skip
    shape: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 8}
    DetrModel(
        DetrConfig(backbone_config=stem, d_model=width, encoder_layers=layers[0], encoder_ffn_dim=32, decoder_layers=1,
                   num_queries=3, **shape)
    ).save_pretrained(folder / "detr")  # fmt: skip
    if isinstance(words, list):
        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    else:
        vocabulary = words
    tokenizer = BertTokenizerFast(vocab=str(vocabulary))
    tokenizer.save_pretrained(folder / "bert")
    BertModel(
        BertConfig(hidden_size=width + 8, intermediate_size=32, num_hidden_layers=layers[1], num_attention_heads=4,
                   vocab_size=len(tokenizer), max_position_embeddings=64)
    ).save_pretrained(folder / "bert")  # fmt: skip
    return ["--model.vision", f"hf/{folder / 'detr'}", "--model.text", f"hf/{folder / 'bert'}"]
