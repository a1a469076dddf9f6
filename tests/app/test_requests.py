"""Typed requests: their defaults, unknown options, and the status and sentence of bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi import HTTPException

from deformux_label.lib.requests.clicks import EditRequest
from deformux_label.lib.requests.inference import InferenceOptions, InferenceRequest, RequestedScan
from deformux_label.lib.requests.submission import MAX_INFO_BYTES, Submission
from deformux_label.lib.requests.training import TrainingRequest

DEFAULTS = {"minutes": 10, "learning_rate": 1e-3}
STARTS = ("published", "scratch")


def test_an_inference_ignores_unknown_options() -> None:
    assert InferenceOptions.model_validate({"model": "x", "steps": "many", "client_id": 5}) == InferenceOptions()
    options = InferenceOptions.model_validate({"uncertainty": ["on", "off"], "save_label": "yes", "logging": "debug"})
    assert (options.uncertainty, options.save_label, options.logging) == (True, True, "DEBUG")
    assert InferenceOptions().label_tag == "original"


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        ({"device": "quantum"}, "device must be one of"),
        ({"logging": None}, "logging must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL; got 'NONE'"),
        ({"uncertainty": 1}, "uncertainty must be one of off, on; got 1"),
        ({"result_extension": "/../x"}, "result_extension must be one of .nii.gz, .nii, .seg.nrrd, .nrrd; got '/../x'"),
        ({"result_dtype": "x", "result_extension": "y"}, "result_extension must be one of"),
    ],
)
def test_the_first_bad_option_of_an_inference_is_named(sent: dict[str, Any], sentence: str) -> None:
    with pytest.raises(HTTPException) as refused:
        InferenceOptions.model_validate(sent)
    assert refused.value.status_code == 400
    assert refused.value.detail.startswith(sentence)


def test_an_edit_has_its_clicks_by_value(tmp_path: Path) -> None:
    asked = InferenceRequest(scan=RequestedScan("scan.nii"), options=InferenceOptions())
    sent = {
        "label": "liver",
        "foreground": [[1, 2, 3]],
        "background": [[1, 2, 3], [4, 5, 6]],
        "voxel_order": ["slicer"],
    }
    request = EditRequest.of(sent, asked, labels=("spleen", "liver"), uploads=tmp_path, client="anna")
    assert request.points == {2: [(1, 2, 3)], 0: [(4, 5, 6)]}
    assert (request.voxel_order, request.mask, request.client) == ("slicer", None, "anna")
    with pytest.raises(HTTPException, match="send a label file") as refused:
        EditRequest.of({"label": "/etc/passwd"}, asked, labels=("liver",), uploads=tmp_path, client="anna")
    assert refused.value.status_code == 403


def test_a_training_has_defaults_and_refuses_bad_numbers() -> None:
    asked = TrainingRequest.of({"steps": "20", "batch_size": [2]}, DEFAULTS, starts=STARTS)
    assert (asked.steps, asked.batch_size, asked.learning_rate) == (20, 2, 1e-3)
    assert (asked.gpus, asked.start_from) == ("all", "published")
    timed = TrainingRequest.of({"minutes": "2.5", "steps": "auto"}, DEFAULTS, starts=STARTS)
    assert (timed.minutes, timed.steps, timed.batch_size) == (2.5, None, None)
    for name, value in (
        ("steps", 1.5),
        ("steps", 0),
        ("minutes", 0),
        ("steps", 10**400),
        ("learning_rate", -1),
        ("start_from", "x"),
        ("gpus", "a"),
    ):
        with pytest.raises(HTTPException, match=f"{name} must be") as refused:
            TrainingRequest.of({name: value}, DEFAULTS, starts=STARTS)
        assert refused.value.status_code == 400


def test_a_submission_keeps_the_clients_information() -> None:
    assert Submission.of("a", "", '{"client_id": "anna", "more": [1]}').model_dump() == {
        "image": "a",
        "tag": "final",
        "info": {"client_id": "anna", "more": [1]},
    }
    for params, status in (("[1]", 400), ('{"client_id": 5}', 400), (f'"{"x" * MAX_INFO_BYTES}"', 413)):
        with pytest.raises(HTTPException) as refused:
            Submission.of("a", "", params)
        assert refused.value.status_code == status
