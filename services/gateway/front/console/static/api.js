// How the page talks to its gateway. The key lives as long as the tab.
const KEY = "infermesh.key";
export const key = () => sessionStorage.getItem(KEY) || "";
export const keep = (value) => sessionStorage.setItem(KEY, value);

export class Refused extends Error {
  constructor(status, error) {
    super(error.message || `HTTP ${status}`);
    this.status = status;
    this.code = error.code || "";
  }
}

export async function call(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (key()) headers.authorization = `Bearer ${key()}`;
  if (options.json !== undefined) {
    options = { ...options, method: "POST", body: JSON.stringify(options.json) };
    headers["content-type"] = "application/json";
  }
  const reply = await fetch(path, { ...options, headers });
  if (!reply.ok) {
    const told = await reply.json().catch(() => ({}));
    throw new Refused(reply.status, told.error || {});
  }
  return reply;
}

// Server-sent events over fetch, since EventSource cannot carry a key: yields {event, data}.
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      let event = "message";
      let data = "";
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) event = line.slice(7);
        else if (line.startsWith("data: ")) data += line.slice(6);
      }
      if (data) yield { event, data };
    }
  }
}

export const served = (reply) => ({
  instance: reply.headers.get("x-infermesh-instance-id") || "",
  model: reply.headers.get("x-infermesh-model-id") || "",
  attempts: reply.headers.get("x-infermesh-attempts") || "",
  degraded: reply.headers.get("x-infermesh-degraded") || "",
  request: reply.headers.get("x-request-id") || "",
});
