"""Worker processes that stay: a distributed test costs milliseconds instead of the seconds that starting processes and torch takes.

A job is a top-level function of a test file. It runs on the first `world_size` workers, which form the default process group of exactly
that size, made for the job and destroyed after it: the code under test sees what it would see under torchrun. With NCCL each worker has the
GPU of its rank. Whatever goes wrong, the workers are thrown away, and the next job starts new ones.
"""

import faulthandler
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from datetime import timedelta

from tests.forked import forking_context

MAX_WORLD_SIZE = 8
GRACE_SECONDS = 0.2
GLOO = "gloo"
NCCL = "cpu:gloo,cuda:nccl"  # as in training: tensors on the host go through gloo


class RankError(Exception):
    """A rank that died, did not answer in time, or raised something that cannot be sent."""


class RankCrashed(RankError):
    """A rank whose process a memory fault ended."""


class Pool:
    """Workers, started by the first job that needs them.

    Args:
        max_world_size: As many workers as there will be.
    """

    def __init__(self, max_world_size=MAX_WORLD_SIZE):
        self.max_world_size = max_world_size
        self._workers, self._store, self._num_jobs = [], None, 0

    def run(self, function, *arguments, world_size, timeout_seconds=120.0, backend=GLOO):
        """What each rank returns, in order of the ranks.

        A job with a memory fault runs once more, with a warning. There is no native code of ours on a CPU; what crashes, rarely, is malloc
        in a thread of gloo (`pt_gloo_runloop`, torch 2.13).

        Args:
            function: Of the top level of a file.
            arguments: The same for every rank.
            world_size: Number of ranks.
            timeout_seconds: For the whole job, and for every collective in it.
            backend: GLOO or NCCL.

        Raises:
            Exception: What a rank has raised, with a note that gives the rank and its traceback.
            RankError: A rank died or took too long.
        """
        if not 1 <= world_size <= self.max_world_size:
            raise ValueError(f"world_size is {world_size}, but the pool has 1 to {self.max_world_size} workers.")
        options = {"world_size": world_size, "timeout_seconds": timeout_seconds, "backend": backend}
        try:
            return self._run(function, *arguments, **options)
        except RankCrashed as crash:
            warnings.warn(f"{crash} The job runs once more.", stacklevel=2)
            return self._run(function, *arguments, **options)

    def _run(self, function, *arguments, world_size, timeout_seconds, backend):
        self._start(world_size)
        self._num_jobs += 1
        job = (self._num_jobs, world_size, timeout_seconds, backend, function.__module__, function.__qualname__)
        for _, connection in self._workers[:world_size]:
            connection.send((job, pickle.dumps(arguments)))
        completed = False
        try:
            results = self._collect(world_size, time.monotonic() + timeout_seconds)
            completed = True
        finally:
            if not completed:
                self.close()
        return results

    def close(self):
        """Ends the workers, whatever they do."""
        for process, connection in self._workers:
            process.kill()
            connection.close()
        for process, _ in self._workers:
            process.join()
        self._workers, self._store = [], None

    @property
    def processes(self):
        """Ids of the workers."""
        return [process.pid for process, _ in self._workers]

    def _start(self, world_size):
        import torch
        import torch.distributed as dist

        if any(not process.is_alive() for process, _ in self._workers):
            self.close()
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn") if torch.cuda.is_available() else forking_context()  # CUDA does not survive a fork
        for rank in range(len(self._workers), world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(rank, self._store.port, theirs), name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, world_size, deadline):
        results, waiting = [None] * world_size, {connection: rank for rank, (_, connection) in enumerate(self._workers[:world_size])}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(f"ranks {sorted(waiting.values())} have not ended within the time-out.")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    results[rank] = self._receive(rank, connection)
                except Exception:
                    self._name_the_dead(waiting)
                    raise
        return results

    def _name_the_dead(self, waiting):
        """A rank that died is why others raise, who may be heard before it is missed."""
        while waiting and (ready := multiprocessing.connection.wait(list(waiting), GRACE_SECONDS)):
            for connection in ready:
                self._message(waiting.pop(connection), connection)

    def _message(self, rank, connection):
        try:
            return connection.recv()
        except (EOFError, ConnectionResetError):
            process = self._workers[rank][0]
            process.join()
            kind = RankCrashed if process.exitcode in (-signal.SIGSEGV, -signal.SIGABRT) else RankError
            raise kind(f"rank {rank} died with exit code {process.exitcode}.") from None

    def _receive(self, rank, connection):
        succeeded, payload, trace = self._message(rank, connection)
        if succeeded:
            return pickle.loads(payload)
        error = _unpickled_error(payload)
        if error is None:
            raise RankError(f"rank {rank} raised:\n{trace}")
        error.add_note(f"on rank {rank}:\n{trace}")
        raise error


def work(rank, port, connection):
    """What a worker does all its life."""
    faulthandler.enable()  # a rank that crashes says where
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that a job starts
    import torch
    import torch.distributed as dist

    from tests import garbage

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        garbage.leave_frozen()  # and after each job, below
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            (number, world_size, timeout_seconds, backend, module, name), arguments = connection.recv()
        except EOFError:  # the tests have ended
            return
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        timeout = timedelta(seconds=timeout_seconds)
        try:
            if backend == NCCL:
                torch.cuda.set_device(rank)  # before the group exists, or all barriers meet on the first GPU
            dist.init_process_group(backend, store=dist.PrefixStore(f"job {number}", store), rank=rank, world_size=world_size, timeout=timeout)
            payload = pickle.dumps(getattr(importlib.import_module(module), name)(*pickle.loads(arguments)))
            dist.barrier()  # nobody closes a connection that another still reads from
            _forget_meshes()
            gc.collect()  # FSDP leaves cycles that hold process groups, too
            gc.freeze()  # what is left are modules, mostly: no later job has to look through them
            dist.destroy_process_group()
        except BaseException as error:
            connection.send((False, _pickled_error(error), traceback.format_exc()))
        else:
            connection.send((True, payload, None))


def _forget_meshes():
    """DTensor remembers what it decided for a mesh, and takes the mesh of the next job, with other process groups, for the same.

    A mesh that is remembered keeps its process groups, and each of those has threads that wake up a hundred times a second.
    """
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import _collective_utils, _redistribute
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
        _redistribute._planner_cache.clear()
        _redistribute._gen_transform_infos.cache_clear()
        _collective_utils.MeshTopoInfo.build_from_mesh.cache_clear()


def _pickled_error(error):
    try:
        return pickle.dumps(error)
    except (pickle.PicklingError, TypeError, AttributeError):
        return None


def _unpickled_error(payload):
    """The error, or None if it cannot be made again from what was sent."""
    try:
        return None if payload is None else pickle.loads(payload)
    except (pickle.UnpicklingError, TypeError, AttributeError, ImportError):
        return None
