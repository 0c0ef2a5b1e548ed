"""All 32 layers of Phi-3-mini with random weights: 9 GB of memory to train in bfloat16, and under 2.6 GB in 4 bits."""

from real.test_full_width import check_nf4, check_training, qlora


def test_phi3_mini_trains_in_bfloat16(shared, real_chats, tmp_path):
    check_training(shared, real_chats, tmp_path, layers=32)


@qlora
def test_phi3_mini_trains_in_4_bits(shared, tmp_path):
    check_nf4(shared, tmp_path, layers=32)
