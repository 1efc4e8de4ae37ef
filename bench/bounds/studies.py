"""All studies of bounds."""

from __future__ import annotations

from trisparse.bench.bounds import linear, linear24, masked_lora, obs, selection
from trisparse.bench.bounds.record import Study

STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY for module in (selection, linear, linear24, masked_lora, obs)
}
