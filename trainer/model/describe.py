"""A model's routers and experts, as `routealign inspect` shows them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState

from data_prep.errors import UserError
from trainer.model.load import read_model
from trainer.model.source import check_source
from trainer.model.tokenizer import check_template, load_tokenizer
from trainer.moe.backbone import Backbone
from trainer.moe.sharding import size
from trainer.recipe.sections import ModelSection
from trainer.runtime.console import say, table


def read(section: ModelSection) -> Backbone:
    """Load a model, without its tokenizer, on this process's own device, and check the module contract numerically.

    Raises:
        UserError: no model there, a dense one, or a router that breaks the contract; names the model and says which.
    """
    name = section.name_or_path
    check_source(name, section.revision)
    dtype = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    model = read_model(name, dtype, revision=section.revision, trust_remote_code=section.trust_remote_code)
    try:
        return Backbone.of(model.to(PartialState().device)).check()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def caution(section: ModelSection) -> str | None:
    """What keeps a run from talking to the model, though its routers and experts can be looked at; or None."""
    try:
        check_template(load_tokenizer(section.name_or_path, section.revision), section.name_or_path)
    except UserError as error:
        return f"caution: {error}; a run would be refused, inspect needs neither"
    return None


def description(backbone: Backbone) -> dict[str, Any]:
    """Plain JSON values: the model's type and sizes, one entry per MoE layer, and what could be trained."""
    model = backbone.model
    total = sum(size(p) for p in model.parameters())
    experts = sum(size(p) for p in backbone.expert_parameters().values())
    return {
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "moe_layers": len(backbone),
        "decoder_layers": model.config.get_text_config().num_hidden_layers,
        "routed_experts": backbone.total_experts,
        "parameters": total,
        "expert_parameters": experts,
        "router_parameters": sum(p.numel() for p in backbone.router_parameters().values()),
        "parameters_per_expert": experts // backbone.total_experts,
        "shared_expert_parameters": sum(size(p) for p in backbone.shared_parameters().values()),
        "layers": [
            {
                "layer": layer.index,
                "router": layer.router_name,
                "experts": layer.experts_name,
                "num_experts": layer.num_experts,
                "top_k": layer.top_k,
                "layout": layer.layout,
                "scoring": layer.scoring.family if layer.scoring else None,
                "scale": layer.scoring.scale if layer.scoring else None,
                "shared_expert": layer.shared is not None,
            }
            for layer in backbone
        ],
    }


def print_table(found: dict[str, Any]) -> None:
    """A description as a table, one row per MoE layer, and what a recipe would change (`would_train`)."""
    columns = ["layer", "router", "experts", "top-k", "layout", "scoring", "shared"]
    rows = [
        [
            layer["layer"],
            layer["router"],
            layer["num_experts"],
            layer["top_k"],
            layer["layout"],
            layer["scoring"] or "not reproduced: can be recorded, not pinned",
            "yes" if layer["shared_expert"] else "no",
        ]
        for layer in found["layers"]
    ]
    title = (
        f"{found['model_type']}, {found['dtype']}: {found['moe_layers']} of {found['decoder_layers']} layers are MoE, "
        f"{found['routed_experts']} experts, {found['parameters'] / 1e6:.1f} M parameters"
    )
    table(title, columns, rows)
    if "would_train" in found:
        plan = found["would_train"]
        share = plan["parameters"] / plan["of_parameters"]
        say(
            f"the recipe trains {plan['experts']} of {plan['of_experts']} experts: "
            f"{plan['parameters']:,} parameters ({share:.1%})"
        )
