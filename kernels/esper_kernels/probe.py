"""What a pass measures, as one vector: the gradient of its probe.

Nothing is mutated by an operator: what a pass measures arrives as the gradient of `probe`, which
autograd adds up like any other. Its layout, for D channels and S seeds:

    sum [D] | sum of squares [D] | dead [D] | gradient energy [D] | explained share [S]
    | rows observed | gradient passes observed | isolated passes
"""


def probe_parts(channels: int, num_seeds: int) -> tuple[int, int, int, int, int, int]:
    """Lengths of the parts of a site's probe; the statistics of the activations are one part."""
    return 3 * channels, channels, num_seeds, 1, 1, 1


def probe_size(channels: int, num_seeds: int) -> int:
    """Length of the `probe` of a site."""
    return sum(probe_parts(channels, num_seeds))
