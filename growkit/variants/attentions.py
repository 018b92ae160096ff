"""What the config field ``attention`` may say, as a table of classes. Imports torch.

Exported folders get the same table with every import written out
(:func:`growkit.variants.catalogue.attention_table`).
"""

from __future__ import annotations

from growkit.variants.catalogue import ATTENTIONS
from growkit.variants.shared.one_call import AttentionBase

VARIANTS: dict[str, type[AttentionBase]] = {
    row.folder: getattr(row.part("attention"), row.attention) for row in ATTENTIONS
}
