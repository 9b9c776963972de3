"""The mailbox of an HTTP request."""

import asyncio

import pytest

from jaxkv.params import SamplingParams
from jaxkv.runtime.outputs import Delta
from jaxkv.serve.calls import Call, Mailbox


def test_what_has_arrived_is_read_before_the_error_that_ends_it():
    async def main() -> None:
        mailbox = Mailbox()
        call = Call("r", [1], SamplingParams(), mailbox)
        deltas = [Delta("r", index) for index in range(3)]
        reader = asyncio.create_task(mailbox.next())
        await asyncio.sleep(0)  # it waits
        mailbox.put(call, deltas[0])
        mailbox.put(call, deltas[1])
        assert await reader == [(call, deltas[0]), (call, deltas[1])]
        mailbox.put(call, deltas[2])
        mailbox.fail(ValueError("first"))
        mailbox.fail(ValueError("second"))
        assert await mailbox.next() == [(call, deltas[2])]
        for _ in range(2):
            with pytest.raises(ValueError, match="first"):
                await mailbox.next()

    asyncio.run(main())


def test_a_reader_that_waits_is_woken_by_an_error():
    async def main() -> None:
        mailbox = Mailbox()
        reader = asyncio.create_task(mailbox.next())
        await asyncio.sleep(0)
        mailbox.fail(ValueError("gone"))
        with pytest.raises(ValueError, match="gone"):
            await asyncio.wait_for(reader, 5)

    asyncio.run(main())
