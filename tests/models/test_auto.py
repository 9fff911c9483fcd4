"""After `import farspan`, the Auto classes and pipelines of transformers know the models, in any order of imports."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.conftest import tiny


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from farspan.data.tokenizers import load_tokenizer

    directory = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer("byte")
    model = tiny("hybrid", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import farspan; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; AutoModelForCausalLM; import farspan",
        "import farspan; from transformers import LlamaForCausalLM, AutoModelForCausalLM",
        "import transformers.modeling_utils, farspan; from transformers import AutoModelForCausalLM",
        "import farspan.models.modeling; from transformers import AutoModelForCausalLM",
        "import farspan; farspan.FarspanConfig(num_hidden_layers=1); from transformers import AutoModelForCausalLM",
    ],
)
def test_auto_model_in_any_order_of_imports(model_directory: Path, imports: str) -> None:
    code = f"{imports}; print(type(AutoModelForCausalLM.from_pretrained({str(model_directory)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "FarspanForCausalLM"


def test_pipeline(model_directory: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, pipeline

    generator = pipeline("text-generation", model=str(model_directory))
    out = generator("def f(", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert out.startswith("def f(")
    assert type(AutoModel.from_pretrained(model_directory)).__name__ == "FarspanModel"
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
