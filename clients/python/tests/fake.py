"""An in-process daemon for tests: the API's shapes, words for tokens, scripted answers."""

from __future__ import annotations

import threading
import time
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from mlxd.v1 import inference_pb2 as pb
from mlxd.v1 import model_pb2, server_pb2, session_pb2
from mlxd.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)
from mlxd.v1.model_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server
from mlxd.v1.server_pb2_grpc import ServerServiceServicer, add_ServerServiceServicer_to_server
from mlxd.v1.session_pb2_grpc import SessionServiceServicer, add_SessionServiceServicer_to_server

MODEL = "SmolLM2-135M-Instruct"
PARIS = "The capital of France is Paris."
DOMAIN = "mlxd.v1"
FILE = b"file of "  # What the file of every session begins with.
# Progress of a load: phase, bytes done, bytes in all.
LOAD = [
    (model_pb2.LOAD_PHASE_DOWNLOADING, 20, 80),
    (model_pb2.LOAD_PHASE_DOWNLOADING, 80, 80),
    (model_pb2.LOAD_PHASE_LOADING, 0, 100),
    (model_pb2.LOAD_PHASE_LOADING, 50, 100),
    (model_pb2.LOAD_PHASE_LOADING, 100, 100),
]


def abort(context, code, reason, message="no", metadata=None, *details):
    """Ends the call as the daemon does: with an ErrorInfo and what belongs to it."""
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata or {})
    for detail in (info, *details):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_trailing_metadata(
        (("grpc-status-details-bin", status.SerializeToString()), ("x-request-id", "r-9"))
    )
    context.abort(code, message)


def _outcome(request):
    """What a turn did: with a history of its own, as if the template wrote the past differently."""
    return {
        pb.HISTORY_APPEND: pb.HISTORY_OUTCOME_APPENDED,
        pb.HISTORY_RERENDER: pb.HISTORY_OUTCOME_RERENDERED,
    }.get(request.history, pb.HISTORY_OUTCOME_UNSPECIFIED)


def _choices(request, text):
    """The outputs where several are asked for: the first is `text`."""
    return [
        f"{text} {number}" if number else text
        for number in range(request.n if request.n > 1 else 0)
    ]


class Fake(
    InferenceServiceServicer, ModelServiceServicer, SessionServiceServicer, ServerServiceServicer
):
    """The services, and what tests look at or set."""

    hang = False  # Stream one delta, or answer nothing, then wait for the caller to leave.

    def __init__(self):
        self.requests = []
        self.metadata = []
        self.deadlines = []
        self.answers = []
        self.error = None  # (code, reason, message, metadata, *details)
        self.refusals = 0  # Number of turns to refuse because the queue is full.
        self.retry_s = 0.01  # When a refused caller is told to try again.
        self.lock = threading.Lock()
        self.hangs = threading.Event()
        self.left = threading.Event()
        self.answer = PARIS
        self.delay = 0.0  # Seconds between deltas.
        self.cold = False  # Sessions find nothing in their cache.
        self.sessions = {}
        self.features = [server_pb2.FEATURE_STREAMING, server_pb2.FEATURE_CHAT]
        self.generated = 0

    def _note(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.deadlines.append(context.time_remaining())
        if self.error:
            abort(context, *self.error)

    # Inference

    def _refuse_when_full(self, context):
        with self.lock:
            full = self.refusals > 0
            self.refusals -= full
        if full:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(round(self.retry_s * 1e9))
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            abort(context, code, "QUEUE_FULL", "the queue is full", {}, retry)

    def _turn(self, request, context):
        self._note(request, context)
        self._refuse_when_full(context)
        name = request.model
        if not name and not request.session:
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        if name not in ("", MODEL):
            abort(context, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", f"no model {name}")
        kind = request.WhichOneof("input")
        if kind == "chat":
            new = [w for m in request.chat.messages for p in m.content for w in p.text.split()]
        else:
            new = request.prompt.split() if kind == "prompt" else list(request.token_ids.ids)
        old = 0
        if request.session:
            session = self.sessions.get(request.session)
            if session is None:
                abort(context, grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
            old = session.token_count
            if request.HasField("expected_token_count") and old != request.expected_token_count:
                facts = {"expected": str(request.expected_token_count), "actual": str(old)}
                abort(context, grpc.StatusCode.ABORTED, "SESSION_MOVED", "moved", facts)
        text = self.answers.pop(0) if self.answers else self.answer
        usage = pb.Usage(
            prompt_tokens=old + len(new),
            cached_tokens=0 if self.cold else old,
            completion_tokens=len(text.split()),
        )
        return text, usage

    def _end(self, request, usage):
        self.generated += usage.completion_tokens
        if not request.session:
            return {}
        session = self.sessions[request.session]
        session.token_count = usage.prompt_tokens + usage.completion_tokens
        session.turns.add(token_count=session.token_count)
        return {"session_token_count": session.token_count}

    def _wait_for_leaving(self):
        self.hangs.set()
        self.left.wait(10)

    def Generate(self, request, context):
        text, usage = self._turn(request, context)
        if self.hang:
            context.add_callback(self.left.set)
            self._wait_for_leaving()
        response = pb.GenerateResponse(
            request_id="r-1",
            model_revision="rev",
            text=text,
            finish_reason=pb.FINISH_REASON_STOP,
            usage=usage,
            history=_outcome(request),
            **self._end(request, usage),
        )
        response.timings.time_to_first_token.FromMilliseconds(25)
        response.timings.decode_time.FromMilliseconds(100)
        if request.output.return_token_ids:
            response.token_ids.extend([1, 2])
        for number, said in enumerate(_choices(request, text)):
            end = pb.FINISH_REASON_LENGTH
            response.choices.add(choice=number, text=said, finish_reason=end, seed=7 + number)
        return response

    def StreamGenerate(self, request, context):
        text, usage = self._turn(request, context)
        yield pb.StreamGenerateResponse(
            started=pb.GenerateStarted(
                request_id="r-1",
                model_revision="rev",
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                history=_outcome(request),
            )
        )
        yield pb.StreamGenerateResponse(
            progress=pb.PrefillProgress(
                done_tokens=usage.prompt_tokens, total_tokens=usage.prompt_tokens
            )
        )
        context.add_callback(self.left.set)
        for index, word in enumerate(text.split(" ")):
            delta = pb.GenerateDelta(text=(" " if index else "") + word)
            yield pb.StreamGenerateResponse(delta=delta)
            time.sleep(self.delay)
            if self.hang:
                self._wait_for_leaving()
                return
        others = _choices(request, text)
        for number, said in reversed(list(enumerate(others))):
            if number > 0:
                yield pb.StreamGenerateResponse(delta=pb.GenerateDelta(text=said, choice=number))
            end = pb.ChoiceFinished(choice=number, finish_reason=pb.FINISH_REASON_LENGTH)
            end.seed = 7 + number
            yield pb.StreamGenerateResponse(choice_finished=end)
        finished = pb.GenerateFinished(
            finish_reason=pb.FINISH_REASON_STOP, usage=usage, **self._end(request, usage)
        )
        finished.timings.time_to_first_token.FromMilliseconds(25)
        finished.timings.decode_time.FromMilliseconds(100)
        yield pb.StreamGenerateResponse(finished=finished)

    def CountTokens(self, request, context):
        self._note(request, context)
        texts = [request.prompt] + [p.text for m in request.chat.messages for p in m.content]
        words = sum(len(text.split()) for text in texts)
        return pb.CountTokensResponse(token_count=words, context_length=8192)

    def Score(self, request, context):
        self._note(request, context)
        score = pb.TokenScore(token=pb.TokenLogprob(token_id=7, logprob=-1.5), has_logprob=True)
        return pb.ScoreResponse(tokens=[score])

    # Models

    def _info(self, name=MODEL):
        return model_pb2.ModelInfo(
            name=name, state=model_pb2.MODEL_STATE_RESIDENT, context_length=8192
        )

    def LoadModel(self, request, context):
        self._note(request, context)
        if request.validate_only:
            validated = model_pb2.LoadValidated(fits=True, needed_bytes=5, available_bytes=9)
            yield model_pb2.LoadModelResponse(validated=validated)
            return
        for phase, done, total in LOAD:
            progress = model_pb2.LoadProgress(phase=phase, done_bytes=done, total_bytes=total)
            yield model_pb2.LoadModelResponse(progress=progress)
        yield model_pb2.LoadModelResponse(loaded=model_pb2.ModelLoaded(model=self._info()))

    def UnloadModel(self, request, context):
        self._note(request, context)
        return model_pb2.UnloadModelResponse(freed_bytes=538)

    def GetModel(self, request, context):
        self._note(request, context)
        return model_pb2.GetModelResponse(model=self._info(request.model))

    def ListModels(self, request, context):
        self._note(request, context)
        if request.resident_only:
            return model_pb2.ListModelsResponse(models=[self._info()])
        if not request.page_token:
            return model_pb2.ListModelsResponse(models=[self._info()], next_page_token="more")
        return model_pb2.ListModelsResponse(models=[self._info("other")])

    # Sessions

    def CreateSession(self, request, context):
        self._note(request, context)
        name = request.name or "chosen"
        if name in self.sessions:
            abort(context, grpc.StatusCode.ALREADY_EXISTS, "SESSION_EXISTS")
        session = session_pb2.Session(
            name=name,
            model=request.model,
            ttl=request.ttl,
            labels=request.labels,
            pinned=request.pinned,
            history=request.history,
        )
        self.sessions[name] = session
        return session_pb2.CreateSessionResponse(session=session)

    def GetSession(self, request, context):
        self._note(request, context)
        if request.name not in self.sessions:
            abort(context, grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
        # Two messages, each a page.
        is_last = request.message_page_token == "1"
        role = pb.ROLE_ASSISTANT if is_last else pb.ROLE_USER
        return session_pb2.GetSessionResponse(
            session=self.sessions[request.name],
            messages=[pb.Message(role=role)] if request.include_messages else [],
            next_message_page_token="1" if request.include_messages and not is_last else "",
        )

    def ListSessions(self, request, context):
        self._note(request, context)
        wanted = request.labels.items()
        found = [one for one in self.sessions.values() if wanted <= one.labels.items()]
        return session_pb2.ListSessionsResponse(sessions=found)

    def UpdateSession(self, request, context):
        self._note(request, context)
        session = self.sessions[request.name]
        for key in request.remove_labels:
            session.labels.pop(key, None)
        session.labels.update(request.labels)
        if request.HasField("pinned"):
            session.pinned = request.pinned
        return session_pb2.UpdateSessionResponse(session=session)

    def ExtendSession(self, request, context):
        self._note(request, context)
        session = self.sessions[request.name]
        usage = pb.Usage(cached_tokens=session.token_count)
        texts = [request.prompt] + [p.text for m in request.chat.messages for p in m.content]
        words = sum(len(text.split()) for text in texts) + len(request.token_ids.ids)
        session.token_count += words
        session.turns.add(token_count=session.token_count)
        usage.prompt_tokens = session.token_count
        return session_pb2.ExtendSessionResponse(session=session, usage=usage)

    def SaveSession(self, request, context):
        self._note(request, context)
        session = self.sessions[request.name]
        tokens = session.token_count
        return session_pb2.SaveSessionResponse(session=session, token_count=tokens, bytes=9)

    def ForkSession(self, request, context):
        self._note(request, context)
        session = session_pb2.Session()
        session.CopyFrom(self.sessions[request.name])
        session.name = request.new_name
        self.sessions[request.new_name] = session
        return session_pb2.ForkSessionResponse(session=session)

    def TruncateSession(self, request, context):
        self._note(request, context)
        session = self.sessions[request.name]
        keep = request.turn_count or request.message_count // 2
        session.token_count = session.turns[keep - 1].token_count if keep else 0
        del session.turns[keep:]
        return session_pb2.TruncateSessionResponse(session=session)

    def DeleteSession(self, request, context):
        self._note(request, context)
        del self.sessions[request.name]
        return session_pb2.DeleteSessionResponse()

    def ExportSession(self, request, context):
        self._note(request, context)
        if request.name not in self.sessions:
            abort(context, grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
        for chunk in (FILE, request.name.encode()):
            yield session_pb2.ExportSessionResponse(chunk=chunk)
        if request.name != "cut":
            yield session_pb2.ExportSessionResponse(finished=session_pb2.ExportFinished())

    def ImportSession(self, parts, context):
        start = next(parts).start
        self._note(start, context)
        chunks = [part.chunk for part in parts]
        assert all(0 < len(chunk) <= 1 << 16 for chunk in chunks)
        file = b"".join(chunks)
        if not file.startswith(FILE):
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, "SESSION_FILE_INVALID")
        name = start.name or file.removeprefix(FILE).decode()
        if name in self.sessions and not start.replace:
            abort(context, grpc.StatusCode.ALREADY_EXISTS, "SESSION_EXISTS")
        session = session_pb2.Session(
            name=name, model=start.model, pinned=start.pinned, ttl=start.ttl, token_count=len(file)
        )
        self.sessions[name] = session
        return session_pb2.ImportSessionResponse(session=session)

    def WatchSessions(self, request, context):
        self._note(request, context)
        context.add_callback(self.left.set)
        if not request.changes_only:
            for name, session in self.sessions.items():
                kind = session_pb2.SESSION_CHANGE_KIND_LISTED
                change = session_pb2.SessionChange(kind=kind, name=name, session=session)
                yield session_pb2.WatchSessionsResponse(change=change)
        yield session_pb2.WatchSessionsResponse(ready=session_pb2.WatchReady())
        if self.hang:
            self._wait_for_leaving()
            return
        abort(context, grpc.StatusCode.UNAVAILABLE, "DRAINING")

    # The daemon

    def Capabilities(self, request, context):
        self._note(request, context)
        return server_pb2.CapabilitiesResponse(
            server=server_pb2.ServerCapabilities(version="0.1.0"),
            models=[
                server_pb2.ModelCapabilities(
                    model=self._info(name),
                    features=self.features,
                    has_chat_template=True,
                    default_sampling=pb.EffectiveSampling(max_tokens=4096),
                )
                for name in request.models or [MODEL]
            ],
        )

    def GetStats(self, request, context):
        self._note(request, context)
        return server_pb2.GetStatsResponse(
            requests_total=len(self.requests),
            decode_tokens_total=self.generated,
            memory=server_pb2.MemoryStats(weight_bytes=538_000_000, mlx_peak_bytes=600_000_000),
        )


def server(fake, address, workers=8):
    """A started gRPC server of `fake` at `address`, with a health service that says SERVING."""
    result = grpc.server(futures.ThreadPoolExecutor(workers))
    add_InferenceServiceServicer_to_server(fake, result)
    add_ModelServiceServicer_to_server(fake, result)
    add_SessionServiceServicer_to_server(fake, result)
    add_ServerServiceServicer_to_server(fake, result)
    check = grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"\x08\x01")
    result.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}),)
    )
    port = result.add_insecure_port(address)
    result.start()
    return result, port


@contextmanager
def running(folder: Path):
    """A fake daemon on a unix socket in `folder`: the fake and its address."""
    fake = Fake()
    address = f"unix://{folder}/d.sock"
    running_server, _ = server(fake, f"unix:{folder}/d.sock")
    try:
        yield fake, address
    finally:
        running_server.stop(None).wait()
