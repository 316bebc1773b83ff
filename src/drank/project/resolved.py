"""Everything of params.yaml that makes one variant."""

from typing import Any

from drank.project.params import Params, Section


def resolved(params: Params, name: str) -> dict[str, Any]:
    """The sections that a variant comes from, under keys that do not depend on its name, so that variants line up.

    ``variant`` (with its ``name``), ``preset``, ``spectrum``, ``covariance``, ``sampling``, ``evaluation``, ``model``
    and ``text``, ``compute`` where params.yaml has it, and ``healing`` where it was healed, in the types of JSON; keys
    without a value are left out.

    Raises:
        ParamsError: params.yaml has no such variant.
    """
    variant, preset = params.variant(name)
    sections: dict[str, Section] = {
        "preset": preset,
        "spectrum": params.spectrum[variant.spectrum],
        "covariance": params.covariance,
        "sampling": params.sampling,
        "evaluation": params.evaluation,
        "model": params.model,
    }
    if "compute" in params.model_fields_set:  # older folders, made before the section was there, stay as they are
        sections["compute"] = params.compute
    if variant.healing:
        sections["healing"] = variant.healing
    document = {key: section.model_dump(mode="json", exclude_none=True) for key, section in sections.items()}
    texts = {key: text.model_dump(mode="json", exclude_none=True) for key, text in params.text.items()}
    return {"variant": {"name": name} | variant.model_dump(mode="json", exclude={"healing"}), "text": texts} | document
