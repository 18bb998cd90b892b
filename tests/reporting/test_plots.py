import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pandas as pd

from trainer.reporting import plots


def frame_of(sizes):
    rows = [(layer, expert, np.sin(layer + expert)) for layer, size in sizes.items() for expert in range(size)]
    return pd.DataFrame(rows, columns=["layer", "expert", "score"])


def test_heat_map_outlines_each_critical_expert_once():
    svg = plots.heat_map(frame_of({1: 4, 2: 4, 5: 4}), {(1, 0), (5, 3)})
    root = ElementTree.fromstring(svg)
    outlines = [g for g in root.iter("g") if g.get("id", "").startswith("heat-map-PatchCollection")]
    assert len(outlines) == 1 and len(list(outlines[0].iter("path"))) + len(list(outlines[0].iter("use"))) == 2


def test_heat_map_takes_layers_of_different_width_and_flat_scores(tmp_path):
    frame = frame_of({0: 2, 3: 6})
    ElementTree.fromstring(plots.heat_map(frame, {(3, 5)}))
    frame["score"] = 0.0
    ElementTree.fromstring(plots.heat_map(frame, set()))
    path = tmp_path / "heat.png"
    plots.save_heat_map(frame, {(0, 1)}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_losses_skip_stage_means_and_say_nothing_where_there_is_nothing():
    log = [{"step": 1, "loss": 2.0, "retain_loss": 0.1}, {"step": 2, "loss": 1.0}, {"step": 2, "train_loss": 1.5}]
    svg = plots.losses({"1-repair": log, "2-empty": [{"step": 1, "learning_rate": 0.1}]})
    assert svg is not None and "retain_loss" in svg and "train_loss" not in svg and "2-empty" not in svg
    assert plots.losses({"2-empty": []}) is None


def test_charts_are_deterministic_and_leave_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    rows = [{"layer": 0, "flip_rate": 0.1, "kl": 0.0}, {"layer": 1, "flip_rate": 0.0, "kl": 0.2}]
    assert plots.drift(rows) == plots.drift(rows)
    assert dict(matplotlib.rcParams) == before


def test_charts_take_the_colours_of_the_page():
    svg = plots.drift([{"layer": 0, "flip_rate": 0.1, "kl": 0.0}])
    assert "currentColor" in svg and "#010203" not in svg and "#040506" not in svg
    assert "xmlns" not in svg and "<metadata" not in svg
