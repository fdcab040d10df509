from worker.queue.kept import BYTES, SECONDS, KeptAnswers

JOB = {"id": "a", "input": {"prompt": "x"}}


def test_an_answer_is_kept_for_its_job_alone_and_for_a_while() -> None:
    now = [0.0]
    kept = KeptAnswers(lambda: now[0])
    answer = {"images": ["data:"], "seed": 1}
    kept.put(JOB, answer)
    assert kept.get(JOB) == answer
    assert kept.get(JOB) is not answer
    assert kept.get({**JOB, "id": "b"}) is None
    assert kept.get({**JOB, "input": {"prompt": "y"}}) is None
    now[0] = SECONDS + 1
    assert kept.get(JOB) is None


def test_what_is_kept_is_bounded() -> None:
    kept = KeptAnswers()
    for number in range(4):
        kept.put({"id": str(number), "input": {}}, {"images": ["x" * (BYTES // 3)]})
    assert [kept.get({"id": str(n), "input": {}}) is not None for n in range(4)] == [
        False,
        False,
        True,
        True,
    ]


def test_jobs_without_an_id_are_not_kept() -> None:
    kept = KeptAnswers()
    kept.put({"input": {"prompt": "a"}}, {"seed": 1})
    assert kept.get({"input": {"prompt": "a"}}) is None
