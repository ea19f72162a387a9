"""The ``petl`` command. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from petl import __version__
from petl.errors import PetlError, nearest

LIGHTNING_VERBS = {
    "fit": "train a method from a YAML config and write the adapter",
    "validate": "metrics of a run's adapter on its validation data",
    "test": "metrics of a run's adapter on its test data",
    "predict": "predictions of a run's adapter on its test data, as CSV",
}
VERBS = {
    **LIGHTNING_VERBS,
    "ls": "list methods, backbones and configs",
    "cp": "copy a shipped config to edit it",
    "report": "parameters, compute and memory of a config, without training",
    "info": "what an adapter is, what it was trained on, whether it is intact",
    "classify": "classify images with an adapter, and draw them",
    "ground": "find what an expression refers to in an image, and draw the box",
    "explain": "what each patch of an image, or word of a sentence, adds to the probability of a class",
    "data": "petl data check --config FILE: what is wrong with a data set; petl data prepare: convert one",
}


def configs_root() -> Path:
    """Where the shipped configs lie: in the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def list_configs() -> list[str]:
    """Names of the shipped configs, e.g. ``vtab/sparse_tuning``."""
    root = configs_root()
    return sorted(str(p.relative_to(root).with_suffix("")).replace(os.sep, "/") for p in root.glob("*/*.yaml"))


def find_config(name: str) -> Path:
    """The file of a shipped config, by name with or without ``.yaml``."""
    short = name.removesuffix(".yaml")
    if short not in list_configs():
        raise PetlError(f"no shipped config {name!r}: {nearest(short, list_configs())}. 'petl ls' lists them.")
    return configs_root() / f"{short}.yaml"


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return (
        "petl: parameter-efficient transfer learning on frozen vision and vision-language backbones\n\n"
        f"usage: petl VERB …\n\n{verbs}\n\n"
        "start:  petl fit --config quickstart/classification        (a shipped config, or a file)\n"
        "help:   petl VERB --help;  every key of a config: petl fit --help, petl fit --model.help petl.Classification\n"
        f"version {__version__}"
    )


def _ls(args: Sequence[str]) -> None:
    argparse.ArgumentParser("petl ls", description=VERBS["ls"]).parse_args(args)
    from petl.backbones import BUNDLED, BUNDLED_TEXT, FAMILIES
    from petl.methods import entries

    print("methods")
    for entry in entries().values():
        print(f"  {entry.cls:<18} {entry.summary}")
    print("backbones")
    for name, size in ((*BUNDLED, "64 px, 2.4 M parameters"), (*BUNDLED_TEXT, "text, 0.8 M parameters")):
        print(f"  {name:<24} in the package, {size}")
    for family, text in FAMILIES.items():
        print(f"  {family:<18} {text}")
    print("configs")
    for name in list_configs():
        first = find_config(name).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        print(f"  {name:<26} {first}")


def _cp(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("petl cp", description=VERBS["cp"])
    parser.add_argument("config", help="name of a shipped config, e.g. vtab/sparse_tuning")
    parser.add_argument("target", type=Path, nargs="?", default=Path("."), help="folder or file to copy to")
    given = parser.parse_args(args)
    source = find_config(given.config)
    target = given.target / source.name if given.target.is_dir() else given.target
    if target.exists():
        raise PetlError(f"{target} exists already; petl does not overwrite your configs. Name another target.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise PetlError(f"{target} cannot be written: {error}") from error
    print(f"copied to {target}; run it with: petl fit --config {target}")


def _resolve_configs(args: Sequence[str]) -> list[str]:
    """Names of shipped configs after --config become files, so that a wheel is enough to run them."""
    resolved, expects = [], False
    for arg in args:
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-c"):
            expects = not equals
            resolved.append(f"{flag}={_config_file(value)}" if equals else arg)
        elif expects:
            resolved.append(_config_file(arg))
            expects = False
        else:
            resolved.append(arg)
    return resolved


def _config_file(name: str) -> str:
    if Path(name).is_file():
        return name
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if short in list_configs():
        return str(find_config(short))
    raise PetlError(f"config {name!r} is neither a file nor a shipped config: {nearest(short, list_configs())}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] in ("-V", "--version"):
        print(__version__)
        return 0
    verb, rest = args[0], args[1:]
    try:
        if verb in LIGHTNING_VERBS:
            from petl.engine.lightning_cli import run

            cli = run([verb, *_resolve_configs(rest)])
            if verb == "fit" and cli.trainer.is_global_zero:
                task = type(cli.model).__name__.lower()
                use = "ground" if "ground" in task else "explain" if "explan" in task else "classify"
                print(f"adapter: {cli.options.run_dir}/adapter   (petl info, petl {use}, petl.load)")
        elif verb == "ls":
            _ls(rest)
        elif verb == "cp":
            _cp(rest)
        elif verb in ("report", "data"):
            from petl.engine.inspect_cli import check_data, report

            (report if verb == "report" else check_data)(_resolve_configs(rest))
        elif verb in ("info", "classify", "ground"):
            from petl.engine import adapter_cli

            getattr(adapter_cli, verb)(rest)
        elif verb == "explain":
            from petl.engine.explain_cli import explain

            explain(rest)
        else:
            raise PetlError(f"petl has no verb {verb!r}: {nearest(verb, VERBS)} 'petl --help' lists them.")
    except PetlError as error:
        print(f"petl: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"petl: {error}. Adapters and checkpoints written before are whole.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("petl: interrupted. Continue a training with --ckpt_path last.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
