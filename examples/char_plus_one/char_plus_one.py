"""A server that answers each character with the next one, and three clients at once. Any wire: the address decides.

    python char_plus_one.py tcp://127.0.0.1:0                   server and clients in one process
    python char_plus_one.py --serve unix:///tmp/plus            a server, until Ctrl-C
    python char_plus_one.py --ask unix:///tmp/plus HAL          a client, in another process: IBM

`pipe:` runs too: nobody listens on an anonymous pipe, so the server gets one end of each client's.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anywire

TEXTS = ("HAL", "Zmxvhqd", "0123456789")
# After the last character before the surrogates comes the first one after them; after the very last, the first.
AFTER_A_GAP = {0xD7FF: 0xE000, 0x10FFFF: 0}


async def plus_one(channel: anywire.Channel) -> None:
    """The server: one of these runs for each client."""
    async for character in channel:
        code = ord(character.decode())
        await channel.send(chr(AFTER_A_GAP.get(code, code + 1)).encode())


async def ask(channel: anywire.Channel, text: str) -> str:
    """A client: send each character, collect the answers."""
    answers = []
    for character in text:
        await channel.send(character.encode())
        answers.append((await channel.recv(timeout=10)).decode())
    return "".join(answers)


async def ask_at(address: str, text: str) -> str:
    """Connect, ask, close."""
    async with anywire.connect(address, wait=10) as channel:
        return await ask(channel, text)


@asynccontextmanager
async def serving(address: str) -> AsyncIterator[list[str]]:
    """A server in this process: where each of the three clients connects."""
    if address != "pipe:":
        async with anywire.serve(plus_one, address, close_timeout=1) as server:
            yield [str(server.addresses[0])] * len(TEXTS)
        return
    ends = [anywire.pipe() for _ in TEXTS]

    async def serve_end(handle: anywire.Handle) -> None:
        async with await anywire.attach(handle) as channel:
            await plus_one(channel)

    servers = [asyncio.create_task(serve_end(theirs)) for _, theirs in ends]
    addresses = []
    for ours, _ in ends:
        addresses.append(ours.address)
        ours.take()                     # from here on the descriptors belong to whoever connects
    yield addresses
    await asyncio.gather(*servers)


async def together(address: str) -> None:
    """Server and clients, at once, in one process."""
    async with serving(address) as addresses:
        asked = [ask_at(where, text) for where, text in zip(addresses, TEXTS, strict=True)]
        for text, answer in zip(TEXTS, await asyncio.gather(*asked), strict=True):
            print(f"{text} -> {answer}")


async def serve(address: str) -> None:
    """Until Ctrl-C; says where it listens."""
    async with anywire.serve(plus_one, address, close_timeout=1) as server:
        print(server.addresses[0], flush=True)
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="only serve")
    parser.add_argument("--ask", action="store_true", help="only ask: what to is the TEXT")
    parser.add_argument("address")
    parser.add_argument("text", nargs="?", default=TEXTS[0])
    arguments = parser.parse_args()
    try:
        if arguments.serve:
            asyncio.run(serve(arguments.address))
        elif arguments.ask:
            print(asyncio.run(ask_at(arguments.address, arguments.text)))
        else:
            asyncio.run(together(arguments.address))
    except KeyboardInterrupt:
        pass
    except (anywire.AnywireError, OSError) as error:
        raise SystemExit(f"char_plus_one: {error}") from None


if __name__ == "__main__":
    main()
