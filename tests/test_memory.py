"""The estimate of a training step's memory against the tensors that autograd saves."""
import pytest
import torch

from tests.bench.memory import memory_per_gpu
from tiny import make_model


def saved_bytes(model, tokens):
    """Bytes of the tensors that autograd saves in a forward, parameters aside."""
    saved = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens[:, :-1], tokens[:, 1:])
    return sum(size for size, _ in saved.values())


@pytest.mark.skipif(torch.__version__.startswith("2.6."),
                    reason="there, attention on CPUs saves more where heads share keys")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_memory_per_gpu_counts_what_is_saved(family):
    model = make_model(96, hidden_size=128, intermediate_size=320, num_hidden_layers=4,
                       model_type=family)
    tokens = torch.randint(96, (8, 65), generator=torch.Generator().manual_seed(3))

    def expected(recompute):
        return memory_per_gpu(model.config, 1, 8 * 64, recompute, "cpu")["activations"]

    bytes_off = saved_bytes(model, tokens)
    model.recompute = True
    bytes_on = saved_bytes(model, tokens)
    assert bytes_off == pytest.approx(expected(False), rel=0.02)
    one_block = (bytes_off - 2 * 128 * 4 * 8 * 64) / 4              # recomputed one at a time
    assert bytes_on + one_block == pytest.approx(expected(True), rel=0.03)
