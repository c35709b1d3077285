"""Writes what the server tells one browser, a JSON line a message; run by ComfyUI's python, which has aiohttp."""

import asyncio
import json
import struct
import sys

import aiohttp

TEXT = 3
"""The server's number for a text shown on a node; previews are the other binary messages."""


async def listen(address: str, client: str) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{address}/ws?clientId={client}") as socket:
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                print(message.data, flush=True)
            elif message.type == aiohttp.WSMsgType.BINARY:
                (kind,) = struct.unpack(">I", message.data[:4])
                shown = (
                    {"type": "text", "text": message.data[4:].decode("utf-8", "replace")}
                    if kind == TEXT
                    else {"type": "preview", "bytes": len(message.data)}
                )
                print(json.dumps(shown), flush=True)


asyncio.run(listen(*sys.argv[1:]))
