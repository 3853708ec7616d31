"""What lmms-eval reads at its entry point: the name of our model and where its class is."""

from typing import Any


def manifest() -> Any:
    """Returns lmms-eval's ``ModelManifest`` for ``--model storm``; lmms-eval calls this, and is there then."""
    from lmms_eval.models.registry_v2 import ModelManifest  # noqa: PLC0415 (not a dependency of ours)

    return ModelManifest(
        model_id="storm",
        chat_class_path="storm_vlm.evaluation.lmms_eval_model.StormLmmsEval",
        aliases=("storm_vlm",),
    )
