"""Converting two gigabytes in shards needs the memory of less than two shards, both ways."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farspan import FarspanConfig
from farspan.models.convert import families
from farspan.models.convert.names import to_published
from farspan.models.convert.plan import skeleton
from farspan.models.convert.writer import ShardWriter

SHARD = 400_000_000

MEASURE = """
import json, resource, sys
from farspan.models.convert import convert

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder, size = sys.argv[1], int(sys.argv[2])
convert(f"{folder}/small", f"{folder}/small-ours")
convert(f"{folder}/small-ours", f"{folder}/small-back", to="original")
before = peak()
done = convert(f"{folder}/large", f"{folder}/ours", max_shard_size=size)
inward = peak() - before
convert(f"{folder}/ours", f"{folder}/back", to="original", max_shard_size=size)
print(json.dumps({"bytes": done.bytes, "in": inward, "back": peak() - before}))
"""


def _checkpoint(directory: Path, width: int, layers: int) -> None:
    """A MetaLA of zeros in bfloat16: its files have holes, which fill memory as data does when they are read."""
    config = FarspanConfig(
        architectures=["FarspanForCausalLM"],
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        mixers=["metala"],
        norm_type="simple_rms_norm",
    )
    family = families.get("metala")
    published: dict[str, Tensor] = to_published(skeleton(config)[1], family.entries(config))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(family.write_config(config)))
    ShardWriter(directory, {name: x.to(torch.bfloat16) for name, x in published.items()}, SHARD).close()


@pytest.mark.slow
def test_memory_stays_below_two_shards(tmp_path: Path) -> None:
    _checkpoint(tmp_path / "large", 2048, 14)
    _checkpoint(tmp_path / "small", 64, 2)
    shards = [path.stat().st_size for path in (tmp_path / "large").glob("model-*.safetensors")]
    assert sum(shards) > 2e9 and len(shards) > 5
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(SHARD)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["bytes"] > 2e9
    assert 0.1 * SHARD < found["in"] < 2 * SHARD, found
    assert found["back"] < 2 * SHARD, found
