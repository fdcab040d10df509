// A request as JSON, curl and Python, ready to run. The key is named, never written.

/** JSON in which a seed of 64 bits, kept as text, is a number again. */
export function json(value, indent) {
  return JSON.stringify(value, (name, one) => (name === "seed" && typeof one === "string" && /^-?\d+$/.test(one) ? `\u0001${one}\u0001` : one), indent)
    .replace(/"\\u0001(-?\d+)\\u0001"/g, "$1");
}

const address = (url) => url || "https://api.runpod.ai/v2/$ENDPOINT_ID";

export function curl(request, url) {
  return `url=\${RUNPOD_ENDPOINT_URL:-${address(url)}}
ask() { curl -sS --fail-with-body -H "Authorization: Bearer $RUNPOD_API_KEY" -H "Content-Type: application/json" -o job.json "$@"; }
ask "$url/runsync" -d @- <<'JSON'
${json({ input: request })}
JSON
while jq -e '.status | test("^IN_")' job.json > /dev/null; do sleep 1; ask "$url/status/$(jq -r .id job.json)"; done
if jq -e '.status == "COMPLETED"' job.json > /dev/null
then jq -r .output.image_url job.json | cut -d, -f2 | base64 -d > picture.png
else cat job.json >&2; false; fi
`;
}

export function python(request, url) {
  const lines = json(json({ input: request }));
  return `import base64, json, os, time
from pathlib import Path

import requests

url = os.environ.get("RUNPOD_ENDPOINT_URL") or ${url ? JSON.stringify(url) : 'f"https://api.runpod.ai/v2/{os.environ[\'ENDPOINT_ID\']}"'}
headers = {"Authorization": f"Bearer {os.environ.get('RUNPOD_API_KEY', '')}"}
request = json.loads(${lines})
job = requests.post(f"{url}/runsync", json=request, headers=headers, timeout=120).json()
while job["status"].startswith("IN_"):
    time.sleep(1)
    job = requests.get(f"{url}/status/{job['id']}", headers=headers, timeout=60).json()
if job["status"] != "COMPLETED":
    raise SystemExit(f"{job['status']}: {job.get('error')}")
for number, picture in enumerate(job["output"]["images"], 1):
    Path(f"picture-{number}.png").write_bytes(base64.b64decode(picture.split(",")[1]))
`;
}

