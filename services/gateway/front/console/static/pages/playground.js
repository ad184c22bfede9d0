// Try the mesh by hand, through the very API that applications use.
import { html, useRef, useState } from "../vendor/preact.js";
import { call, events, served } from "../api.js";
import { count, percent, seconds, t } from "../words.js";

const TABS = [["chat", "Chat", Chat], ["similarity", "Similarity", Similarity], ["rerank", "Rerank", Rerank]];

export function Playground({ mesh, at }) {
  const wanted = at.split("/")[1] || "chat";
  const Tab = (TABS.find(([name]) => name === wanted) || TABS[0])[2];
  return html`<nav class="tabs" aria-label="playground">${TABS.map(([name, title]) => html`<a href="#playground/${name}" aria-current=${name === wanted ? "page" : undefined}>${t(title)}</a>`)}</nav>
    <${Tab} models=${mesh.state.models} />`;
}

const names = (models, kind) => models.filter((one) => one.kind === kind).flatMap((one) => [one.id, ...one.aliases]);

function Pick({ models, kind, value, set }) {
  const found = names(models, kind);
  if (!found.length) return html`<p class="notice">${t("no model of this kind is served")}</p>`;
  return html`<label for="model">${t("model")}</label><select id="model" value=${value || found[0]} onChange=${(event) => set(event.target.value)}>${found.map((one) => html`<option>${one}</option>`)}</select>`;
}

function By({ who }) {
  return html`<span class="by">${who.model} ${t("on")} <a href="#resources/${who.instance}">${who.instance}</a>${who.degraded && ` · ${t("degraded from")} ${who.degraded}`}${who.attempts > 1 ? ` · ${t("attempts")} ${who.attempts}` : ""}${who.ttft != null ? ` · ${t("first token")} ${seconds(who.ttft)}` : ""}${who.took ? ` · ${seconds(who.took)}` : ""}${who.rate ? ` · ${who.rate.toFixed(1)} ${t("tokens/s")}` : ""}${who.prompt ? ` · ${count(who.prompt)} ${t("prompt tokens")}, ${t("of which cached")} ${percent(who.cached / who.prompt)}` : ""} · <a href="#routing/${encodeURIComponent(who.request)}">${t("why")}</a></span>`;
}

function Chat({ models }) {
  const [model, choose] = useState("");
  const [turns, say] = useState([]);
  const [busy, work] = useState(null);
  const [fault, fail] = useState("");
  const box = useRef();
  const [options, tune] = useState({ system: "", temperature: "0.7", longest: "256" });
  const send = async (event) => {
    event?.preventDefault();
    const text = box.current.value.trim();
    const chosen = model || names(models, "llm")[0];
    if (!text || busy || !chosen) return;
    const stop = new AbortController();
    work(stop);
    fail("");
    box.current.value = "";
    const { system, temperature, longest } = options;
    const before = [...turns, { role: "user", content: text }];
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...before.map(({ role, content }) => ({ role, content }))];
    const answer = { role: "assistant", content: "", reasoning: "", who: null };
    const show = () => say([...before, { ...answer }]);
    show();
    const began = performance.now();
    let first = 0;
    try {
      const json = { model: chosen, messages, temperature: Number(temperature), max_tokens: Number(longest) || 256, stream: true, stream_options: { include_usage: true } };
      const reply = await call("../v1/chat/completions", { json, signal: stop.signal });
      answer.who = { ...served(reply), ttft: null };
      for await (const { data } of events(reply)) {
        if (data === "[DONE]") break;
        const part = JSON.parse(data);
        if (part.error) throw new Error(part.error.message);
        first ||= performance.now();
        const delta = part.choices[0]?.delta || {};
        answer.content += delta.content || "";
        answer.reasoning += delta.reasoning || delta.reasoning_content || "";
        answer.who.ttft = (first - began) / 1000;
        if (part.usage) {
          const took = (performance.now() - first) / 1000;
          answer.who.rate = took > 0 && part.usage.completion_tokens > 1 ? (part.usage.completion_tokens - 1) / took : 0;
          answer.who.prompt = part.usage.prompt_tokens;
          answer.who.cached = part.usage.prompt_tokens_details?.cached_tokens || 0;
        }
        show();
      }
    } catch (error) {
      fail(stop.signal.aborted ? t("stopped") : error.message);
    }
    show();
    work(null);
    box.current?.focus();
  };
  const keys = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(event); };
  const set = (name) => (event) => tune({ ...options, [name]: event.target.value });
  return html`<div class="two">
    <form class="card" onSubmit=${send} onKeyDown=${keys}>
      <${Pick} models=${models} kind="llm" value=${model} set=${choose} />
      <label for="system">${t("system")}</label><textarea id="system" rows="2" value=${options.system} onInput=${set("system")}></textarea>
      <div class="row"><div><label for="temperature">${t("temperature")}</label><input id="temperature" class="short" type="number" min="0" max="2" step="0.1" value=${options.temperature} onInput=${set("temperature")} /></div>
        <div><label for="longest">${t("longest answer")}</label><input id="longest" class="short" type="number" min="1" value=${options.longest} onInput=${set("longest")} /></div></div>
      <label for="message">${t("message")}</label>
      <textarea id="message" ref=${box} rows="4"></textarea>
      <div class="row"><button class="main" disabled=${Boolean(busy)}>${t("send")}</button>
        ${busy && html`<button type="button" onClick=${() => busy.abort()}>${t("stop")}</button>`}
        <button type="button" disabled=${Boolean(busy)} onClick=${() => { say([]); fail(""); }}>${t("clear")}</button>
        <span class="soft small">${t("Ctrl+Enter sends")}</span></div>
    </form>
    <div class="card talk" aria-live="polite">
      ${turns.map((turn) => html`<p class="turn ${turn.role}">${turn.reasoning && html`<span class="soft">${turn.reasoning}\n</span>`}${turn.content}${turn.who && html`<${By} who=${turn.who} />`}</p>`)}
      ${fault && html`<p class="fault">${fault}</p>`}
    </div>
  </div>`;
}

// One request of a form: its result, who answered, or what went wrong.
function useAsk() {
  const [got, set] = useState({});
  const ask = async (path, json) => {
    set({ busy: true });
    const began = performance.now();
    try {
      const reply = await call(path, { json });
      const body = await reply.json();
      set({ body, who: { ...served(reply), took: (performance.now() - began) / 1000 } });
    } catch (error) {
      set({ fault: error.message });
    }
  };
  return [got, ask];
}

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

function Similarity({ models }) {
  const [model, choose] = useState("");
  const [got, ask] = useAsk();
  const [texts, keep] = useState([]);
  const send = (event) => {
    event.preventDefault();
    const input = lines(new FormData(event.target).get("texts"));
    keep(input);
    if (input.length) ask("../v1/embeddings", { model: model || names(models, "embedding")[0], input });
  };
  const vectors = got.body ? got.body.data.map((one) => one.embedding) : [];
  const cosine = (a, b) => { let dot = 0, x = 0, y = 0; for (let i = 0; i < a.length; i++) { dot += a[i] * b[i]; x += a[i] * a[i]; y += b[i] * b[i]; } return dot / Math.sqrt(x * y || 1); };
  return html`<div class="two"><form class="card" onSubmit=${send}>
      <${Pick} models=${models} kind="embedding" value=${model} set=${choose} />
      <label for="texts">${t("one text a line")}</label>
      <textarea id="texts" name="texts" rows="6">${"The cat sleeps on the sofa.\nA kitten naps on the couch.\nInterest rates rose by a quarter point."}</textarea>
      <button class="main" disabled=${got.busy}>${t("compare")}</button>
    </form>
    <div class="card">${got.fault && html`<p class="fault">${got.fault}</p>`}
      ${vectors.length > 0 && html`<div class="scroll"><table><tbody>${vectors.map((a, row) => html`<tr><td class="wide">${texts[row]}</td>
        ${vectors.map((b) => { const value = cosine(a, b); return html`<td class="heat" style=${{ background: `color-mix(in oklab, #14532d ${Math.round(Math.max(0, value) * 100)}%, #6b7280)` }}>${value.toFixed(3)}</td>`; })}</tr>`)}</tbody></table></div>
        <p class="turn"><${By} who=${got.who} /></p>`}
    </div></div>`;
}

function Rerank({ models }) {
  const [model, choose] = useState("");
  const [got, ask] = useAsk();
  const send = (event) => {
    event.preventDefault();
    const given = new FormData(event.target);
    ask("../v1/rerank", { model: model || names(models, "rerank")[0], query: given.get("query"), documents: lines(given.get("documents")), return_documents: true });
  };
  return html`<div class="two"><form class="card" onSubmit=${send}>
      <${Pick} models=${models} kind="rerank" value=${model} set=${choose} />
      <label for="query">${t("query")}</label><input id="query" name="query" value="capital of France" required />
      <label for="documents">${t("documents, one a line")}</label>
      <textarea id="documents" name="documents" rows="6">${"Bananas are yellow.\nParis is the capital of France.\nThe train to Lyon leaves at nine."}</textarea>
      <button class="main" disabled=${got.busy}>${t("rank")}</button>
    </form>
    <div class="card">${got.fault && html`<p class="fault">${got.fault}</p>`}
      ${got.body && html`<div class="scroll"><table><thead><tr><th scope="col" class="number">${t("score")}</th><th scope="col"></th></tr></thead><tbody>${got.body.results.map((one) => html`<tr><td class="number">${one.relevance_score.toFixed(4)}</td><td class="wide">${one.document.text}</td></tr>`)}</tbody></table></div>
        <p class="turn"><${By} who=${got.who} /></p>`}
    </div></div>`;
}
