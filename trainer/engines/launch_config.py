"""The accelerate YAML of a launch: what it asks for, what it must not say, what the launch has to say beside it.

Light, as `table` is.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# What accelerate (1.15, `_deepspeed_config_checks`) refuses beside a deepspeed_config_file, with twenty lines of text.
INLINE = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_param_nvme_path",
    "offload_optimizer_nvme_path",
    "zero3_save_16bit_model",
)
AUTO_EP = "expert_parallel"
"""The section of a DeepSpeed configuration that turns on AutoEP (DeepSpeed >= 0.19)."""


@dataclass(frozen=True)
class LaunchConfig:
    """A checked accelerate YAML. `settings`: DeepSpeed's JSON where it lies elsewhere than the YAML says."""

    path: Path
    deepspeed: bool
    settings: Path | None = None

    def arguments(self, nodes: int) -> list[str]:
        """What `accelerate launch` must be told beside the file."""
        found = [] if self.settings is None else ["--deepspeed_config_file", str(self.settings)]
        if self.deepspeed and nodes > 1:
            found += ["--deepspeed_multinode_launcher", "standard"]
        return found

    def environment_on_cpus(self) -> dict[str, str]:
        """What the processes must be told where there is no GPU."""
        # accelerate 1.15 runs plain DDP, and says nothing, where its own CPU switch and DeepSpeed meet.
        if self.deepspeed:
            return {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
        return {"ACCELERATE_USE_CPU": "true"}


def config_of(engine: str) -> Path:
    """The project's own accelerate YAML of an engine."""
    return ROOT / "ds_configs" / f"{engine}.yaml"


def read(path: Path) -> LaunchConfig:
    """Read an accelerate YAML and check it.

    Raises:
        UserError: one process, settings that accelerate refuses or that miss, AutoEP, DeepSpeed that is not installed.
    """
    config = _mapping(path)
    kind = config.get("distributed_type")
    if kind in ("MULTI_GPU", "FSDP"):
        return LaunchConfig(path, deepspeed=False)
    if kind != "DEEPSPEED":
        raise UserError(
            f"{path}: distributed_type: found {kind!r}; allowed: MULTI_GPU, DEEPSPEED, FSDP; for one process take"
            " --engine single"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise no_deepspeed()
    section = config.get("deepspeed_config") or {}
    named = section.get("deepspeed_config_file")
    if named is None:
        raise UserError(
            f"{path}: deepspeed_config has no deepspeed_config_file; settings given inline cannot say all that is"
            " needed, so name a JSON file such as ds_configs/zero3.json"
        )
    inline = [key for key in INLINE if key in section] + [key for key in ("mixed_precision",) if key in config]
    if inline:
        raise UserError(f"{path}: {', '.join(inline)} beside deepspeed_config_file; set it in {named} and not here")
    file = next((at for at in (Path(named), ROOT / named) if at.is_file()), None)
    if file is None:
        raise UserError(f"{path}: deepspeed_config_file: {named}: no such file")
    if (_mapping(file).get(AUTO_EP) or {}).get("enabled"):
        raise _auto_ep(f"{file}: {AUTO_EP}")
    return LaunchConfig(path, deepspeed=True, settings=None if file == Path(named) else file)


def processes_in(path: Path, nodes: int) -> int | None:
    """The processes of each node in an accelerate YAML; None: it does not say.

    Raises:
        UserError: another number of nodes, or processes that cannot be shared out among them.
    """
    config = _mapping(path)
    named, total = config.get("num_machines", 1), config.get("num_processes")
    if named != nodes:
        raise UserError(f"{path}: num_machines: found {named}, --nodes says {nodes}; let them agree")
    if total is not None and (not isinstance(total, int) or total < nodes or total % nodes):
        raise UserError(f"{path}: num_processes: found {total!r}, expected a multiple of num_machines ({nodes})")
    return total // nodes if total else None


def check_override(key: str) -> None:
    """Refuse a recipe's key that is meant to turn on AutoEP."""
    if AUTO_EP in key or "autoep" in key.replace("_", ""):
        raise _auto_ep(key)


def no_deepspeed() -> UserError:
    """The error where DeepSpeed is asked for and not installed. Returned, not raised."""
    return UserError("deepspeed: not installed; pip install 'routealign[gpu]', or --engine fsdp2")


def _auto_ep(where: str) -> UserError:
    return UserError(
        f"{where}: DeepSpeed's AutoEP replaces whole MoE blocks, routers and critical experts with them; take it out"
        " and use --engine zero3"
    )


def _mapping(path: Path) -> dict[str, Any]:
    """The contents of a YAML or JSON file."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type(found).__name__}, expected keys with values")
    return found
