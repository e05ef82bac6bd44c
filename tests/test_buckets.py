from oel_ray.buckets import buckets


def test_buckets_keep_the_order_and_the_limit() -> None:
    words = ["abc", "defgh", "ij", "klmnopqrstu", "v", "", "wxyzabcde", "fghijklmno"]
    assert list(buckets(words, len, 10)) == [words[:3], words[3:4], words[4:7], words[7:]]
    assert list(buckets([], len, 10)) == []
