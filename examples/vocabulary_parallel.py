"""A loss whose output embeddings are cut over the vocabulary: each process has a part of the rows.

    torchrun --nproc-per-node 2 examples/vocabulary_parallel.py

Every process gets the loss of one device, and the gradient of its own part.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import auxkern

TEXT = "The glacier moved an inch a day, and nobody saw it move."


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """The loss of the parts, and that of the whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="Hub name or folder")
    options = parser.parse_args(argv)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    lm = AutoModelForCausalLM.from_pretrained(options.model).eval()
    ids = AutoTokenizer.from_pretrained(options.model)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = lm.base_model(ids).last_hidden_state
    embedding = lm.get_output_embeddings().weight.detach()
    torch.manual_seed(0)
    aux_embedding = 0.02 * torch.randn(embedding.shape[0], 64)
    aux_hidden = torch.randn(*ids.shape, 64, requires_grad=True)

    # What a process of a tensor-parallel model has: so many rows, not all alike.
    lm_part = embedding.tensor_split(world)[rank]
    aux_part = aux_embedding.tensor_split(world)[rank].requires_grad_()
    shard = auxkern.VocabularyShard.of(dist.group.WORLD, len(lm_part))  # asks the others once
    heads = [auxkern.Head(hidden, lm_part), auxkern.Head(aux_hidden, aux_part)]
    loss = auxkern.cross_entropy(heads, ids, shift=True, process_group=shard)
    loss.backward()

    whole = [auxkern.Head(hidden, embedding), auxkern.Head(aux_hidden.detach(), aux_embedding)]
    expected = auxkern.cross_entropy(whole, ids, shift=True)
    ids_here = f"ids {shard.first_id} to {shard.first_id + shard.size - 1}"
    print(f"rank {rank}, {ids_here}: loss {loss:.6f}, of one device {expected:.6f}")
    return loss.item(), expected.item()


if __name__ == "__main__":
    main()
