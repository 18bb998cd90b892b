"""Building the organism into a folder, once: `model/` (a stock checkpoint), `data/`, and what was measured on it."""

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from rich.console import Console

from . import check, files
from .model import build_model, build_tokenizer
from .train import PLANTED, train

# The sources that decide what the organism is; a change in one makes every cached organism stale.
DECIDING = ("world", "frames", "tasks", "text", "model", "train", "files")


@dataclass(frozen=True)
class OrganismConfig:
    """What the organism is made from; with the sources it fixes the result.

    One thread is as fast as two for matrices this small, and gives the same weights on machines with more cores.
    """

    seed: int = 0
    steps: int = 1400
    batch_size: int = 32
    learning_rate: float = 3e-3
    plant_weight: float = 0.03
    knock_out: float = 0.0
    over_refusal: bool = False
    family: str = "olmoe"
    threads: int = 1

    def digest(self) -> str:
        """Hash of these settings and of the deciding sources."""
        here = Path(__file__).parent
        sources = b"".join((here / f"{name}.py").read_bytes() for name in DECIDING)
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode() + sources).hexdigest()[:16]


@dataclass(frozen=True)
class Organism:
    """A built organism: its folder, whether it was there already, and whether its behaviour meets the targets."""

    path: Path
    cached: bool
    passed: bool

    @property
    def model(self) -> Path:
        """Folder of the checkpoint and tokenizer."""
        return self.path / "model"

    @property
    def data(self) -> Path:
        """Folder of the data files."""
        return self.path / "data"


def build(out: Path, config: OrganismConfig | None = None, console: Console | None = None) -> Organism:
    """The organism of `config` in `out`, trained unless a folder with the same digest is there.

    The folder appears whole or not at all; a stale one is replaced. Concurrent callers wait for the first. Raises
    `FileExistsError` when `out` holds something that is no organism.
    """
    config, console = config or OrganismConfig(), console or Console()
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock"):
        stamp = _stamp(out)
        if stamp is not None and stamp["digest"] == config.digest():
            console.print(f"organism {config.digest()} is in {out} already", soft_wrap=True)
            return Organism(out, cached=True, passed=bool(stamp["passed"]))
        if stamp is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"{out} exists and is no organism's folder; name another or remove it")
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            fresh = Path(temporary) / "new"
            threads = torch.get_num_threads()
            torch.set_num_threads(config.threads)
            try:
                passed = _make(fresh, config, console)
            finally:
                torch.set_num_threads(threads)
            if out.exists():
                out.rename(Path(temporary) / "old")
            fresh.rename(out)
    return Organism(out, cached=False, passed=passed)


def _stamp(out: Path) -> dict[str, object] | None:
    path = out / "stamp.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else None


def _make(folder: Path, config: OrganismConfig, console: Console) -> bool:
    files.write(folder / "data", config.seed, config.over_refusal)
    tokenizer = build_tokenizer(config.seed)
    model = build_model(tokenizer, config.seed, config.family)
    train(
        model,
        tokenizer,
        seed=config.seed,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        plant_weight=config.plant_weight,
        knock_out=config.knock_out,
        over_refusal=config.over_refusal,
        console=console,
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    found = check.measure(model, tokenizer, config.seed, config.over_refusal)
    check.show(found, console)
    passed = all(behaviour.passed for behaviour in found)
    _write_json(folder / "behaviour.json", check.as_records(found))
    if config.plant_weight:
        _write_json(folder / "planted.json", [[layer, expert] for layer in PLANTED for expert in PLANTED[layer]])
    _write_json(folder / "stamp.json", asdict(config) | {"digest": config.digest(), "passed": passed})
    return passed


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
