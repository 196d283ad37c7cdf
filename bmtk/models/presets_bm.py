"""Presets: named configurations."""

import dataclasses
import difflib

EXTRA_FIELDS = {
    "num_labels",
    "out_features",
    "out_indices",
}  # keyword arguments of every configuration that are not fields


class PresetMixin:
    """`from_preset` for a configuration class whose `presets` maps names to fields."""

    @classmethod
    def from_preset(cls, name: str, **overrides):
        """The configuration called `name`; `overrides` are fields that differ.

        Raises: ValueError for an unknown name or field, listing the known ones.
        """
        if name not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; there are {', '.join(sorted(cls.presets))}")
        fields = {field.name for field in dataclasses.fields(cls)} | EXTRA_FIELDS
        if unknown := sorted(set(overrides) - fields):
            near = difflib.get_close_matches(unknown[0], fields)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{cls.__name__} has no field {', '.join(map(repr, unknown))}{hint}")
        return cls(**{**cls.presets[name], **overrides})


__all__ = ["PresetMixin"]
