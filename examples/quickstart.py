"""Run a file of chat completions through Pronghorn with the OpenAI SDK.

BASE_URL=http://127.0.0.1:8080 JOB_ID=job-... python quickstart.py input.jsonl output.jsonl
"""

import os
import sys
import time

from openai import OpenAI

input_path, output_path = sys.argv[1:]
client = OpenAI(base_url=os.environ["BASE_URL"] + "/v1", api_key="reserved")

# 1. Upload
with open(input_path, "rb") as f:
    file = client.files.create(file=f, purpose="batch")
print(f"uploaded {input_path} as {file.id}")

# 2. Create the batch
batch = client.batches.create(
    input_file_id=file.id,
    endpoint="/v1/chat/completions",
    completion_window="unlimited",
    extra_body={"job_id": os.environ["JOB_ID"]},
)
print(f"created {batch.id}")

# 3. Poll until it has ended
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(1)
    batch = client.batches.retrieve(batch.id)
    counts = batch.request_counts
    print(f"{batch.status}: {counts.completed} of {counts.total} lines, {counts.failed} failed", flush=True)
if batch.status != "completed":
    sys.exit(f"the batch has {batch.status}: {batch.errors}")

# 4. Download the answers, and the lines that failed if there are any
client.files.content(batch.output_file_id).write_to_file(output_path)
print(f"wrote {output_path}: {batch.usage.total_tokens} tokens in and out")
if batch.error_file_id:
    client.files.content(batch.error_file_id).write_to_file(output_path + ".errors")
    sys.exit(f"{batch.request_counts.failed} lines failed, see {output_path}.errors")
