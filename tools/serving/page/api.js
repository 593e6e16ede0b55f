// The server's API: JSON, and streams of parts.

let token = sessionStorage.getItem("token") ?? "";

export class NeedsToken extends Error {}

export function useToken(value) {
  token = value;
  sessionStorage.setItem("token", value);
}

async function send(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  const method = body === undefined ? "GET" : "POST";
  const answer = await fetch(path, { method, headers, body: JSON.stringify(body), signal });
  if (answer.status === 401) throw new NeedsToken("the server asks for its token");
  if (!answer.ok) throw new Error(await reason(answer));
  return answer;
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

export async function ask(path, body, signal) {
  return (await send(path, body, signal)).json();
}

// Gives the choices of a completion as they come, each with what it adds.
export async function* stream(body, signal) {
  const answer = await send("v1/completions", { ...body, stream: true, stream_order: "writing" }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (pending + value).split("\n");
    pending = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) yield { ...choice, seed: event.seed };
    }
  }
}
