from modcompile.export.layer_work import told_work, work_metadata


def test_layers_that_count_alike_are_not_told() -> None:
    assert work_metadata({0: 1.0, 1: 1.0}) == {}
    assert told_work({}) == {}


def test_others_come_back_as_they_were() -> None:
    work = {2: 0.2, 3: 0.8}
    assert told_work(work_metadata(work)) == work
