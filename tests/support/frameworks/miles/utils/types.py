"""miles' Sample (miles/utils/types.py, revision 31f1ca961): answers come in by a method of another name."""

from __future__ import annotations

from typing import Any

from slime.utils.types import ENDS
from slime.utils.types import Sample as SlimeSample


class Sample(SlimeSample):
    def update_from_meta_info(self, args: Any, meta_info: dict[str, Any]) -> None:
        if args.sglang_speculative_algorithm:
            self.spec_info.add(meta_info=meta_info)
        self.prefix_cache_info.add(meta_info=meta_info)
        self.weight_versions.append(meta_info["weight_version"])
        self.status = ENDS[meta_info["finish_reason"]["type"]]
