"""The arm that is a server, against small servers that speak vLLM's, SGLang's and plain OpenAI."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from specdec.errors import ConfigError, SpecdecError
from specdec_bench.contracts import Unit
from specdec_bench.measure.server_arm import ServerArm
from specdec_bench.results.records import Setting, UnitRecord
from specdec_bench.summary.acceptance import acceptance_of
from specdec_integrations.servers.dialects import Reply, rounds_of

ROUNDS = [[5], [6, 7, 8], [9], [10, 11]]  # the first is the prefill's
TEXT = [token for part in ROUNDS for token in part]


@dataclass
class Fake:
    """What a fake server does, and what it was asked."""

    owner: str
    models: list[str] = field(default_factory=lambda: ["toy"])
    rounds: list[list[int]] = field(default_factory=lambda: ROUNDS)
    counters: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    incremental: bool = False
    fails: str = ""
    delay: float = 0.0
    clears: str = ""  # path that clears the prefix cache
    cleared: list[int] = field(default_factory=list)  # requests that there were by then
    cache_config: str = ""


class Handler(BaseHTTPRequestHandler):
    fake: Fake

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        fake, path = self.fake, self.path
        if path == "/v1/models":
            cards = [{"id": name, "owned_by": fake.owner} for name in fake.models]
            self.reply(json.dumps({"object": "list", "data": cards}))
        elif path == "/metrics" and fake.owner == "vllm":
            lines = ["# HELP vllm:spec_decode_num_drafts_total x", 'other_total{a="b"} 3']
            for name, value in fake.counters.items():
                series, _, position = name.partition("@")
                label = f',position="{position}"' if position else ""
                lines.append(f'{series}_total{{engine="0",model_name="toy"{label}}} {value}.0')
                lines.append(
                    f'{series}_total{{engine="0",model_name="other"{label}}} {3 * value}.0'
                )
                lines.append(f'{series}_created{{engine="0",model_name="toy"{label}}} 1.7e+09')
            self.reply("\n".join([*lines, fake.cache_config]))
        elif (path, fake.owner) in (("/server_info", "vllm"), ("/get_server_info", "sglang")):
            self.reply(json.dumps(fake.info))
        else:
            self.reply("nothing here", 404)

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path in ("/flush_cache", "/reset_prefix_cache"):
            busy = self.path == fake.clears and len(fake.cleared) % 3 == 1  # done with it soon
            fake.cleared.append(-1 if busy else len(fake.asked))
            self.reply("Cache flushed." if not busy else "busy", 400 if busy else 200) if (
                self.path == fake.clears
            ) else self.reply("no such path", 404)
            return
        fake.asked.append(body)
        fake.headers.append(dict(self.headers))
        if fake.fails == "http":
            self.reply(json.dumps({"error": {"message": "the context is full"}}), 400)
            return
        if fake.fails == "html":
            self.reply("<html>welcome</html>")
            return
        if fake.fails == "silent":
            time.sleep(1.0)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if fake.fails == "not json":
            self.wfile.write(b"data: {oops\n\n")
        else:
            self.events(body)

    def events(self, body: dict[str, Any]) -> None:
        fake, said = self.fake, []
        for number, part in enumerate(fake.rounds):
            time.sleep(fake.delay)
            said += part
            text = "".join(f"<{token}>" for token in part)
            if self.path == "/generate":
                whole = said if not fake.incremental else part
                meta: dict[str, Any] = {"completion_tokens": len(said)}
                if number == len(fake.rounds) - 1:
                    meta |= fake.counts
                self.event({"output_ids": list(whole), "text": text, "meta_info": meta})
            else:
                choice: dict[str, Any] = {"index": 0, "text": text}
                if fake.owner == "vllm":
                    assert body["return_token_ids"] is True
                    choice["token_ids"] = part
                self.event({"choices": [choice]})
            if fake.fails == "error event":
                self.event({"error": {"message": "engine is dead"}})
            if fake.fails == "cut":
                return
        self.event({"choices": [], "usage": {"completion_tokens": len(said)}})
        for name, grown in fake.counts.items():
            if name in fake.counters:
                fake.counters[name] += grown
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value: dict[str, Any]) -> None:
        if value.get("choices") == [] and self.path == "/generate":
            return
        # What Python takes for ends of lines besides "\n" and "\r" ends no line of a stream.
        text = json.dumps({"note": "a\u2028b\x85c\x1ed", **value}, ensure_ascii=False)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def reply(self, text: str, code: int = 200) -> None:
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(fake: Fake) -> Iterator[str]:
    handler = type("Mine", (Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def vllm(**more: Any) -> Fake:
    names = ["num_drafts", "num_draft_tokens", "num_accepted_tokens"]
    names += [f"num_accepted_tokens_per_pos@{at}" for at in range(3)]
    standing = dict(zip(names, [40, 120, 50, 30, 15, 5], strict=True))
    # Of the three rounds behind the prefill one had no draft: 2 drafts of 3 tokens, 2 + 1 accepted.
    grown = dict(zip(names, [2, 6, 3, 2, 1, 0], strict=True))
    counters = {f"vllm:spec_decode_{name}": value for name, value in standing.items()}
    counts = {f"vllm:spec_decode_{name}": value for name, value in grown.items()}
    counters["vllm:generation_tokens"], counts["vllm:generation_tokens"] = 1000, len(TEXT)
    return Fake("vllm", counters=counters, counts=counts, **more)


def sglang(**more: Any) -> Fake:
    counts = {
        "spec_verify_ct": 3,
        "spec_correct_drafts_histogram": [1, 1, 1],
        "spec_num_proposed_drafts": 9,
    }
    info = {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1}
    return Fake("sglang", counts=counts, info=info, **more)


def unit(rows: int = 1, tokens: int = len(TEXT)) -> Unit:
    prompts = [[1, 2, 3]] * rows
    record = UnitRecord(0, "u", "c", "code", 2**40 + 3, [3] * rows, tokens, 0.0, "")
    ids = torch.tensor(prompts)
    return Unit(record, 0, prompts, [TEXT] * rows, ids, torch.ones_like(ids))


def arm(url: str, tokenizer: Any = None) -> ServerArm:
    return ServerArm.of(url, None, tokenizer, Setting())


def test_vllm_counters_are_read_by_difference() -> None:
    fake = vllm()
    with serving(fake) as url:
        server = arm(url)
        assert (server.engine, server.counts_rounds, server.in_process) == ("vllm", True, False)
        assert server.run(unit()) == [TEXT]
        found = server.instrumented(unit())
    assert found.arm == f"server:{url}"
    # One round of 3, one of 2, and one in which nothing was drafted: what the stream showed.
    assert found.histogram == {"1": 1, "2": 1, "3": 1}
    assert (found.rounds, found.drafted, found.chain) == (3, 6, True)
    assert [tokens for tokens, _ in found.gaps] == [3, 1, 2]
    acceptance = acceptance_of([found])
    assert acceptance is not None
    assert acceptance.tau_per_step == 2.0
    assert acceptance.marginal == (2 / 3, 1 / 3)
    asked = fake.asked[0]
    assert asked["prompt"] == [1, 2, 3]
    assert (asked["temperature"], asked["max_tokens"], asked["ignore_eos"]) == (0, 7, True)
    assert 0 <= asked["seed"] < 2**31


def test_a_stream_that_lumps_rounds_together_is_not_taken_for_rounds() -> None:
    with serving(vllm(rounds=[[5], [6, 7, 8, 9], [10, 11]])) as url:
        found = arm(url).instrumented(unit())
    assert [tokens for tokens, _ in found.gaps] == [4, 2]
    assert found.histogram == {"1": 1, "2": 1, "3": 1}  # from the counters; one had no draft


def test_sglang_figures_come_with_the_answer() -> None:
    for incremental in (False, True):
        fake = sglang(incremental=incremental)
        with serving(fake) as url:
            server = arm(url + "/v1/")
            found = server.instrumented(unit())
            assert server.run(unit()) == [TEXT]
        assert found.histogram == {"1": 1, "2": 1, "3": 1}
        assert (found.rounds, found.drafted, found.chain) == (3, 9, True)
        assert [tokens for tokens, _ in found.gaps] == [3, 1, 2]
        assert fake.asked[0]["sampling_params"]["max_new_tokens"] == 7


def test_sglang_trees_and_servers_without_speculation() -> None:
    fake = sglang()
    fake.info["speculative_eagle_topk"] = 4
    with serving(fake) as url:
        assert not arm(url).instrumented(unit()).chain
    fake = Fake("sglang", info={"speculative_algorithm": None})
    with serving(fake) as url:
        found = arm(url).instrumented(unit())
    assert (found.histogram, found.rounds, found.drafted) == ({}, 0, 0)


def reply(*bursts: int) -> Reply:
    return Reply(list(range(sum(bursts))), "", [(n, 0.1 * at) for at, n in enumerate(bursts)])


@pytest.mark.parametrize(
    ("streams", "counted", "wanted"),
    [
        ([(1, 3, 1, 2)], {3: 1, 2: 1}, {3: 1, 1: 1, 2: 1}),
        # The last round accepted 4, of which one token was wanted; three rounds had no draft.
        ([(1, 5, 1, 1, 5, 1, 1)], {5: 3}, {5: 2, 1: 4}),
        ([(1, 5, 2)], {5: 1, 4: 1}, {5: 1, 2: 1}),
        ([(1, 5, 2), (1, 1, 3)], {5: 1, 4: 1, 3: 1}, {5: 1, 2: 1, 1: 1, 3: 1}),
        # Two rounds in one event, or a last round that accepted less than came: not the rounds.
        ([(1, 5, 4, 3)], {5: 1, 3: 1, 2: 2}, None),
        ([(4, 5, 3)], {5: 1, 3: 1}, None),
        ([(1, 5, 4)], {5: 1, 3: 1}, None),
        ([(1, 6, 2)], {5: 1, 2: 1}, None),
        ([(8,)], {3: 2}, None),
    ],
)
def test_the_stream_shows_rounds_where_it_fits_the_counters(
    streams: list[tuple[int, ...]], counted: dict[int, int], wanted: dict[int, int] | None
) -> None:
    assert rounds_of(counted, [reply(*stream) for stream in streams]) == (wanted or counted)


def test_clocks_and_rows_of_a_batch() -> None:
    fake = vllm(delay=0.05)
    with serving(fake) as url:
        found = arm(url).instrumented(unit(rows=2))
    assert found.histogram == {"1": 2, "2": 2, "3": 2}
    assert found.rounds == 3
    assert 0.05 <= found.first_token < found.seconds
    assert found.seconds < 0.39  # one after the other would take 0.4
    assert all(gap > 0.03 for _, gap in found.gaps)


def test_a_server_that_sends_text_only() -> None:
    class Split:
        def __call__(self, text: str, **_: Any) -> Any:
            ids = [int(part) for part in text.strip("<>").split("><")]
            return type("Encoding", (), {"input_ids": ids})()

    with serving(Fake("somebody")) as url:
        server = arm(url, Split())
        assert not server.counts_rounds
        assert server.run(unit()) == [TEXT]
        assert server.instrumented(unit()).histogram == {}
        with pytest.raises(ConfigError, match="no tokenizer"):
            arm(url).run(unit())


@pytest.mark.parametrize(
    ("name", "grown"),
    [("vllm:spec_decode_num_accepted_tokens", 9), ("vllm:generation_tokens", 30),
     ("vllm:spec_decode_num_drafts", 40), ("vllm:spec_decode_num_drafts", -50)],
)  # fmt: skip
def test_foreign_traffic_is_noticed(name: str, grown: int) -> None:
    fake = vllm()
    fake.counts[name] += grown
    with serving(fake) as url, pytest.raises(SpecdecError, match=r"nobody else|started anew"):
        arm(url).instrumented(unit())


def test_sglang_figures_that_contradict_each_other() -> None:
    fake = sglang()
    fake.counts["spec_verify_ct"] = 5
    with serving(fake) as url, pytest.raises(SpecdecError, match="5 verifications, and 3"):
        arm(url).instrumented(unit())


def test_a_wrong_number_of_tokens() -> None:
    with serving(vllm()) as url, pytest.raises(SpecdecError, match="7 tokens where 8"):
        arm(url).run(unit(tokens=8))


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("http", "400.*the context is full"),
        ("html", "not JSON: <html>welcome"),
        ("not json", "not JSON: {oops"),
        ("error event", "engine is dead"),
        ("cut", "broke its stream off"),
    ],
)
def test_failures_name_the_address(fails: str, message: str) -> None:
    fake = vllm()
    with serving(fake) as url:
        server = arm(url)
        fake.fails = fails
        with pytest.raises(ConfigError, match=message) as raised:
            server.run(unit())
        assert url in str(raised.value)


def test_a_silent_server() -> None:
    fake = vllm()
    with serving(fake) as url:
        server = arm(f"{url},timeout=0.1")
        fake.fails = "silent"
        with pytest.raises(ConfigError, match=r"sent nothing for 0\.1 seconds"):
            server.run(unit())


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(ConfigError, match=f"cannot reach http://127.0.0.1:{port}.*running"):
        arm(f"http://127.0.0.1:{port}")


def test_models_of_a_server(tmp_path: Any) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    fake = vllm(models=["toy", "other"])
    with serving(fake) as url:
        with pytest.raises(ConfigError, match="serves toy, other; add ,model=NAME"):
            arm(url)
        with pytest.raises(ConfigError, match="no model 'toi'; it serves toy, other"):
            arm(f"{url},model=toi")
        server = arm(f"{url},model=toy,key_file={key}")
        server.run(unit())
    assert fake.asked[-1]["model"] == "toy"
    assert fake.headers[-1]["Authorization"] == "Bearer secret"
    assert "secret" not in server.name
    for odd in (b"two keys", "schlüssel".encode(), "schlüssel".encode("latin-1")):
        key.write_bytes(odd)
        with pytest.raises(ConfigError, match=r"one key of ASCII|not UTF-8 text"):
            arm(f"http://127.0.0.1:9,model=toy,key_file={key}")
    with serving(Fake("vllm", models=[])) as url, pytest.raises(ConfigError, match="lists no mod"):
        arm(url)


@pytest.mark.parametrize(
    "address",
    ["ftp://host", "http://", "localhost:8000", "http://user:pass@host", "http://host:x",
     "http://host?x=1", "http://host,modle=x", "http://host,timeout=0", "http://host,timeout=nan",
     "http://host,key_file=/nonexistent", "file:///etc/passwd"],
)  # fmt: skip
def test_bad_addresses(address: str) -> None:
    with pytest.raises(ConfigError) as raised:
        arm(address)
    assert "pass@" not in str(raised.value)


def test_sampling_is_refused() -> None:
    with pytest.raises(ConfigError, match="a server's random numbers are its own"):
        ServerArm.of("http://127.0.0.1:9", None, None, Setting(temperature=0.7))


@pytest.mark.parametrize("make", [lambda: vllm(clears="/reset_prefix_cache"),
                                  lambda: sglang(clears="/flush_cache")])  # fmt: skip
def test_the_prefix_cache_is_cleared_before_every_request(make: Any) -> None:
    fake = make()
    with serving(fake) as url:
        server = arm(url)
        assert server.facts == {"engine": fake.owner, "prefix_cache": "cleared"}
        start = time.perf_counter()
        server.run(unit())
        whole = time.perf_counter() - start
        assert server.seconds is not None
        assert 0 < server.seconds < whole
        server.instrumented(unit())
        server.run(unit())
    assert [count for count in fake.cleared if count >= 0] == [0, 0, 1, 2]
    assert len(fake.asked) == 3


def test_a_server_that_keeps_prompts_is_known_by_it() -> None:
    off = 'vllm:cache_config_info{block_size="16",enable_prefix_caching="False"} 1.0'
    for fake, state in (
        (vllm(), "kept"),
        (sglang(), "kept"),
        (vllm(cache_config=off), "off"),
        (vllm(cache_config=off.replace("False", "True")), "kept"),
        (Fake("somebody"), "unknown"),
    ):
        with serving(fake) as url:
            assert arm(url).facts["prefix_cache"] == state
    fake = sglang()
    fake.info["disable_radix_cache"] = True
    with serving(fake) as url:
        assert arm(url).facts["prefix_cache"] == "off"


def test_a_cache_that_can_no_longer_be_cleared_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec_integrations.servers.prefix_cache._WAIT", 0.05)
    fake = sglang(clears="/flush_cache")
    with serving(fake) as url:
        server = arm(url)
        fake.clears = ""
        with pytest.raises(SpecdecError, match="no longer clears the prefix cache"):
            server.run(unit())
    assert not fake.asked


def test_servers_that_draft_from_earlier_answers_are_refused() -> None:
    fake = sglang()
    fake.info["speculative_algorithm"] = "NGRAM"
    with serving(fake) as url, pytest.raises(ConfigError, match="NGRAM"):
        arm(url)
    said = "SpeculativeConfig(method='suffix', num_spec_tokens=8)"
    with serving(vllm()) as url:
        assert arm(url)
    fake = vllm()
    fake.info["vllm_config"] = said
    with serving(fake) as url, pytest.raises(ConfigError, match="suffix decoding"):
        arm(url)
    fake.info["vllm_config"] = said.replace("8", "8, suffix_decoding_max_cached_requests=0")
    with serving(fake) as url:
        assert arm(url)


def test_tokens_that_come_with_the_first_are_counted() -> None:
    with serving(vllm(rounds=[[5, 6, 7], [8, 9], [10, 11]])) as url:
        assert arm(url).instrumented(unit()).first_tokens == 3
