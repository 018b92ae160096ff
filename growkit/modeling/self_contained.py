# SPDX-License-Identifier: Apache-2.0
"""Models whose saved folder brings its own code: it loads where growkit is not installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar


class SelfContained:
    """Stands in front of a PreTrainedModel among the bases of a class."""

    config: Any

    # Set by the growkit package: writes the code of a model type into a folder and returns its
    # auto_map. With trust_remote_code it stays None: there transformers itself copies the files.
    code_exporter: ClassVar[Callable[[str | os.PathLike[str], str], dict[str, str]] | None] = None

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save weights, config and the code, so that the folder loads without growkit.

        Raises:
            ValueError: ``push_to_hub``, which would upload the folder without the code.
        """
        exporter = type(self).code_exporter
        if exporter is not None:
            if kwargs.get("push_to_hub"):
                raise ValueError("push_to_hub=True: call model.push_to_hub(repo_id) instead.")
            if kwargs.get("is_main_process", True):
                self.config.auto_map = exporter(save_directory, self.config.model_type)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
