"""Finds the layers of a language model whose attention heads find and copy what stood in the text before.

    python benchmarks/copying_heads.py [--model FOLDER_OR_ID]

A text of random tokens is written twice. A head that, at a token of the second time, looks at the token after its first
time is one that copies (an induction head); the table has the largest such weight of each layer, and that of heads that
look one token back. How many layers of a language model a projector must be trained through depends on this: a model that
is cut below its copying heads cannot answer by repeating an option.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from storm_vlm.model.default_model import compose_default_parts

NUM_TEXTS, NUM_TOKENS = 4, 80


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a language model; the default model's if left out")
    arguments = parser.parse_args()
    model = (
        AutoModelForCausalLM.from_pretrained(arguments.model).base_model
        if arguments.model
        else compose_default_parts()[0].language_model
    )
    model.set_attn_implementation("eager")
    table = Table("layer", "copies", "looks one back", title="largest mean attention weight of a head")
    for layer, (copies, previous) in enumerate(measure(model)):
        table.add_row(str(layer), f"{copies:.2f}", f"{previous:.2f}")
    Console().print(table)


@torch.no_grad()
def measure(model: torch.nn.Module) -> list[tuple[float, float]]:
    """Returns, for each layer, the largest weight on the copied token and on the token before."""
    torch.manual_seed(0)
    vocabulary = model.config.vocab_size
    text = torch.randint(vocabulary // 50, vocabulary, (NUM_TEXTS, NUM_TOKENS))
    attentions = model(input_ids=torch.cat([text, text], 1), output_attentions=True).attentions
    second = torch.arange(NUM_TOKENS, 2 * NUM_TOKENS - 1)
    everywhere = torch.arange(1, 2 * NUM_TOKENS)
    return [
        (
            float(weights[:, :, second, second - NUM_TOKENS + 1].mean((0, 2)).max()),
            float(weights[:, :, everywhere, everywhere - 1].mean((0, 2)).max()),
        )
        for weights in attentions
    ]


if __name__ == "__main__":
    main()
