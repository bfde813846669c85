import itertools

from seqzoo.draws import AUGMENTED, PART, WHOLE, derive_seed


def test_seeds_differ_where_a_number_does():
    numbers = [*itertools.product(range(3), repeat=5), *itertools.product(range(1, 4), range(3), range(3))]
    assert len({derive_seed(*each) for each in numbers}) == len(numbers)
    assert derive_seed(7) == derive_seed(7, 0) == derive_seed(7, 0, 0, 0) != derive_seed(7, 0, 0, 0, 0)


def test_draws_of_one_batch_have_seeds_of_their_own():
    seeds = [derive_seed(7, kind) for kind in (AUGMENTED, WHOLE)] + [derive_seed(7, PART, rank) for rank in range(8)]
    assert len({7, derive_seed(7), *seeds}) == 12
