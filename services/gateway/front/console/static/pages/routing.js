// Decisions as they are made, and why each was.
import { html, useEffect, useMemo, useState } from "../vendor/preact.js";
import { call } from "../api.js";
import { clock, count, percent, seconds, t } from "../words.js";

const TERMS = ["wait", "line", "room", "prefill", "reserve", "decode", "preempt"];

export function Routing({ mesh, at }) {
  const wanted = decodeURIComponent(at.split("/").slice(1).join("/"));
  const [held, hold] = useState(null); // what the table shows while it is paused
  const [failures, only] = useState(false);
  const [text, search] = useState("");
  const all = held || mesh.requests;
  const shown = useMemo(() => all.filter((one) => (!failures || one.outcome !== "ok") && (!text || `${one.request_id} ${one.model} ${one.instance} ${one.tenant} ${one.method} ${one.outcome}`.includes(text))), [all, failures, text]);
  return html`
    ${wanted && html`<${Why} id=${wanted} />`}
    <div class="row">
      <h2 class="grow">${t("Routing")}</h2>
      <input aria-label=${t("filter")} placeholder=${t("filter")} value=${text} onInput=${(event) => search(event.target.value)} />
      <label class="row"><input type="checkbox" checked=${failures} onChange=${() => only(!failures)} />${t("failures only")}</label>
      <button onClick=${() => hold(held ? null : mesh.requests)}>${t(held ? "go on" : "pause")}</button>
    </div>
    ${all.length === 0 ? html`<p class="soft">${t("Every request that ends appears here. Send one from the playground.")}</p>` : html`
    <div class="scroll"><table>
      <thead><tr>${["time", "request", "model", "instance", "why", "outcome", "waited", "first token", "duration", "prompt", "cached", "answer"].map((name, index) => html`<th scope="col" class=${index > 5 ? "number" : ""}>${t(name)}</th>`)}</tr></thead>
      <tbody>${shown.slice(0, 100).map((one) => html`<${Line} key=${one.number} one=${one} picked=${one.request_id === wanted} />`)}</tbody>
    </table></div>`}
    ${!wanted && html`<p class="soft small">${t("Choose a request to see why it went where it went.")}</p>`}
    <${Explain} mesh=${mesh} />`;
}

function Line({ one, picked }) {
  const open = () => { location.hash = `routing/${encodeURIComponent(one.request_id)}`; };
  return html`<tr class="pick" tabindex="0" aria-selected=${picked ? "true" : undefined} onClick=${open} onKeyDown=${(event) => event.key === "Enter" && open()}>
    <td>${clock(one.at)}</td>
    <td class="small">${one.request_id.slice(0, 16)} <span class="soft">${one.method}</span></td>
    <td>${one.model}${one.degraded_from ? html` <span class="chip">↓ ${one.served_model}</span>` : ""}</td>
    <td>${one.instance || "–"}${one.attempts > 1 ? html` <span class="chip">× ${one.attempts}</span>` : ""}</td>
    <td class="small">${one.reason}</td>
    <td><span class="outcome ${one.outcome}">${one.outcome}</span></td>
    <td class="number">${seconds(one.waited_s)}</td><td class="number">${seconds(one.ttft_s)}</td><td class="number">${seconds(one.duration_s)}</td>
    <td class="number">${count(one.prompt_tokens)}</td><td class="number">${one.prompt_tokens ? percent(one.cached_tokens / one.prompt_tokens) : "–"}</td><td class="number">${count(one.completion_tokens)}</td>
  </tr>`;
}

function Why({ id }) {
  const [told, tell] = useState(null);
  const [fault, fail] = useState("");
  useEffect(() => {
    tell(null);
    fail("");
    call(`api/requests/${encodeURIComponent(id)}`).then((reply) => reply.json()).then(tell, (error) => fail(error.message));
  }, [id]);
  return html`<section class="card" aria-label="decision">
    <div class="row"><h3 class="grow">${id}</h3><a href="#routing">${t("close")}</a></div>
    ${fault && html`<p class="fault">${fault}</p>`}
    ${told && html`<p class="small soft">${told.method} · ${told.tenant} · ${clock(told.at)} · ${t("first token")} ${seconds(told.ttft_s)} · ${t("predicted first token")} ${seconds(told.predicted_ttft_s)}</p>
      ${told.tried.map((tried, index) => html`
        <h2>${told.tried.length > 1 ? `${t("attempt")} ${index + 1}: ` : ""}<span class="outcome ${tried.outcome}">${tried.outcome}</span></h2>
        <${Decision} record=${tried.record} />`)}`}
  </section>`;
}

export function Decision({ record }) {
  const longest = Math.max(1e-9, ...record.candidates.map((one) => TERMS.reduce((sum, term) => sum + (one.terms[term] || 0), 0)));
  const candidates = [...record.candidates].sort((a, b) => a.cost_s - b.cost_s);
  return html`
    <p>${record.model}${record.degraded_from ? html` <span class="chip">${t("degraded from")} ${record.degraded_from}</span>` : ""} → <strong>${record.chosen || t("no candidate")}</strong> <span class="chip">${record.reason}</span>
      <span class="soft small">${count(record.prompt_tokens)} + ${count(record.output_tokens)} ${t("tokens")}, ${t("of which cached")} ${count(record.cached_tokens)}, ${t("waited")} ${seconds(record.waited_s)}</span></p>
    ${candidates.length > 0 && html`<div class="scroll"><table>
      <thead><tr><th scope="col">${t("candidates")}</th><th scope="col" class="number">${t("cost")}</th><th scope="col">${t("terms, seconds")}</th><th scope="col" class="number">${t("cached")}</th><th scope="col"></th></tr></thead>
      <tbody>${candidates.map((one) => html`<tr class=${one.id === record.chosen ? "chosen" : ""}>
        <td>${one.id}${one.weight !== 1 ? html` <span class="chip">× ${one.weight}</span>` : ""}</td><td class="number">${seconds(one.cost_s)}</td>
        <td><div class="terms" role="img" aria-label=${TERMS.map((term) => `${term} ${(one.terms[term] || 0).toFixed(3)} s`).join(", ")}>
          ${TERMS.map((term) => html`<i class=${term} title="${t(term)} ${(one.terms[term] || 0).toFixed(4)} s" style=${{ width: `${100 * (one.terms[term] || 0) / longest}%` }}></i>`)}</div></td>
        <td class="number">${count(one.cached_tokens)}</td><td class="small soft">${one.ready ? "" : t("waiting")}</td>
      </tr>`)}</tbody></table></div>
      <p class="legend small soft">${TERMS.map((term) => html`<span><i class=${term}></i>${t(term)}</span>`)}</p>`}
    ${record.rejected.length > 0 && html`<p class="small">${t("rejected instances")}: ${record.rejected.map((one) => html`<span class="chip">${one.id}: ${one.reason}</span>`)}</p>`}`;
}

function Explain({ mesh }) {
  const [record, show] = useState(null);
  const [fault, fail] = useState("");
  const ask = (event) => {
    event.preventDefault();
    const given = new FormData(event.target);
    const model = mesh.state.models.find((one) => one.id === given.get("model"));
    const query = new URLSearchParams({ model: model.id, kind: model.kind, prompt_tokens: given.get("prompt"), max_tokens: given.get("answer") });
    fail("");
    call(`api/explain?${query}`).then((reply) => reply.json()).then(show, (error) => { show(null); fail(error.message); });
  };
  if (!mesh.state.models.length) return null;
  return html`<section aria-label="explain"><h2>${t("Where would it go now?")}</h2>
    <form class="row" onSubmit=${ask}>
      <select name="model" aria-label=${t("model")}>${mesh.state.models.map((one) => html`<option>${one.id}</option>`)}</select>
      <input class="short" name="prompt" type="number" min="1" max="9999999" value="1000" aria-label=${t("prompt tokens")} title=${t("prompt tokens")} />
      <input class="short" name="answer" type="number" min="1" max="9999999" value="200" aria-label=${t("answer tokens")} title=${t("answer tokens")} />
      <button class="main">${t("explain")}</button>
    </form>
    ${fault && html`<p class="fault">${fault}</p>`}
    ${record && html`<div class="card"><${Decision} record=${record} /></div>`}
  </section>`;
}
