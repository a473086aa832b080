"""A file to S3 in parts, of which those that have arrived are not sent again.

A multipart upload that was begun stays until it is completed or aborted; it is found by its key,
which is named after the content. Of parts nobody sees anything before the upload is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr_hpc.exchange.executors import in_threads
from flwr_hpc.exchange.store import KEY
from flwr_hpc.exchange.transfer import Interrupted, Transfer

STREAMS = 4
LEAST, MOST_PARTS = 8 << 20, 10_000  # bytes of a part; S3's own limits are 5 MiB and this


def upload(fs: Any, path: Path, target: str, transfer: Transfer) -> None:
    """Have a file at `target`, whole at once; nobody else must be uploading it.

    Parameters
    ----------
    fs : s3fs.S3FileSystem
    path : Path
    target : str
        A name that says what is in the file: an upload that was begun for it is continued.
    transfer : Transfer
    """
    size = path.stat().st_size
    length = _part_length(size)
    if size <= length:
        fs.put_file(str(path), target)
        return
    bucket, key, _ = fs.split_path(target)
    place = {"Bucket": bucket, "Key": key}
    try:
        begun = (found["UploadId"] for found in _begun(fs, bucket, key) if found["Key"] == key)
        place["UploadId"] = next(begun, "") or _begin(fs, place)
        _complete(fs, place, path, length, transfer)
    except FileNotFoundError as exc:  # aborted meanwhile, as by a rule of the bucket
        raise Interrupted(f"the upload to {target} is gone: {exc}") from exc
    fs.invalidate_cache(target)


def abandon(fs: Any, root: str) -> None:
    """Abort the uploads of payloads that were begun below a folder: their parts cost money."""
    bucket, prefix, _ = fs.split_path(root)
    for upload in _begun(fs, bucket, f"{prefix}/"):
        if KEY.fullmatch(upload["Key"].removeprefix(f"{prefix}/")):
            fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])


def _complete(fs: Any, place: dict[str, str], path: Path, length: int, transfer: Transfer) -> None:
    """Send the parts that are missing, and have the whole appear."""
    size = path.stat().st_size
    there = {part["PartNumber"]: part for part in _parts(fs, place)}
    transfer.total, transfer.done = size, 0

    def send(number: int) -> dict[str, Any]:
        first = (number - 1) * length
        count = min(length, size - first)
        part = there.get(number, {})
        if part.get("Size") != count:
            with open(path, "rb") as file:
                file.seek(first)
                body = file.read(count)
            part = fs.call_s3("upload_part", **place, PartNumber=number, Body=body)
        transfer.advance(count)
        return {"PartNumber": number, "ETag": part["ETag"]}

    parts = in_threads(send, range(1, -(-size // length) + 1), STREAMS)
    fs.call_s3("complete_multipart_upload", **place, MultipartUpload={"Parts": parts})


def _begin(fs: Any, place: dict[str, str]) -> str:
    return str(fs.call_s3("create_multipart_upload", **place)["UploadId"])


def _begun(fs: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    """Return the uploads under way; none where they may not be listed, or cannot."""
    try:
        answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
    except (FileNotFoundError, PermissionError, NotImplementedError):
        return []
    return list(answer.get("Uploads", []))


def _parts(fs: Any, place: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the parts of an upload that have arrived; an answer holds a thousand."""
    marker = 0
    while True:
        answer = fs.call_s3("list_parts", **place, PartNumberMarker=marker)
        yield from answer.get("Parts", [])
        if not answer.get("IsTruncated"):
            return
        marker = answer["NextPartNumberMarker"]


def _part_length(size: int) -> int:
    return max(LEAST, -(-size // MOST_PARTS))
