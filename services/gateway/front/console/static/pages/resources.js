// Hosts, cards and what each instance is doing.
import { html, useEffect } from "../vendor/preact.js";
import { ago, clock, count, percent, seconds, t } from "../words.js";
import { Groups } from "./groups.js";

export function Resources({ mesh, at }) {
  const { instances, groups, now } = mesh.state;
  const wanted = decodeURIComponent(at.split("/").slice(1).join("/"));
  useEffect(() => { document.getElementById(`instance-${wanted}`)?.scrollIntoView({ block: "center" }); }, [wanted]);
  const hosts = Map.groupBy ? Map.groupBy(instances, (one) => one.host) : group(instances);
  if (!instances.length) return html`<p class="soft">${t("No instance is registered yet. `infermesh up` starts a mesh; `infermesh llm --registry …` adds an instance.")}</p>`;
  return html`<${Groups} groups=${groups} />${[...hosts].map(([host, own]) => html`<section aria-label=${host}>
    <h2>${host} <span class="soft small">${own.length} × ${[...new Set(own.map((one) => one.device || one.kind))].join(", ")}</span></h2>
    <div class="grid">${own.map((one) => html`<${Instance} key=${one.id} one=${one} now=${now} marked=${one.id === wanted} />`)}</div>
  </section>`)}`;
}

function group(instances) {
  const found = new Map();
  for (const one of instances) found.set(one.host, [...(found.get(one.host) || []), one]);
  return found;
}

function Instance({ one, now, marked }) {
  const [since, state] = one.changes.at(-1);
  const speed = one.speed || {};
  const used = one.kv_used_ratio;
  return html`<article class="card" id="instance-${one.id}" data-state=${state} aria-current=${marked ? "true" : undefined}>
    <div class="row"><h3 class="grow">${one.id}</h3><span class="state ${state}">${t(state)}</span></div>
    <div class="soft small">${one.kind} · ${one.model || "–"}${one.tier ? ` · ${one.tier}` : ""} · ${state} ${ago(since, now)}</div>
    ${one.rejected_reason && html`<p class="fault small">${one.rejected_reason}</p>`}
    <dl class="facts small">
      <dt>${t("running")}</dt><dd>${one.running ?? "–"} · ${t("waiting")} ${one.waiting ?? "–"} · ${t("in flight")} ${one.in_flight}</dd>
      <dt>${t("KV cache")}</dt><dd><div class="row"><div class="meter grow ${used > 0.9 ? "high" : ""}" role="meter" aria-label=${t("KV cache")} aria-valuenow=${Math.round((used || 0) * 100)}><i style=${{ width: `${(used || 0) * 100}%` }}></i></div>${percent(used)}</div></dd>
      ${one.device && html`<dt>${t("device")}</dt><dd>${one.metadata.device_count > 1 ? `${one.metadata.device_count} × ` : ""}${one.device}</dd>`}
      <${Speed} speed=${speed} />
      ${one.metadata.group && html`<dt>${t("group")}</dt><dd>${one.metadata.group}</dd>`}
      <dt>${t("address")}</dt><dd>${one.address}</dd>
      ${one.weight !== 1 && html`<dt>${t("weight")}</dt><dd>${one.weight}</dd>`}
    </dl>
    <div class="history" role="img" aria-label="${t("health history")}: ${one.changes.map(([at, word]) => `${word} ${clock(at)}`).join(", ")}">
      ${one.changes.map(([at, word], index) => {
        const until = one.changes[index + 1]?.[0] ?? now;
        return html`<i class=${word} title="${word} ${clock(at)}, ${ago(at, until)}" style=${{ flexGrow: Math.max(1, Math.log2(2 + until - at)) }}></i>`;
      })}
    </div>
  </article>`;
}

function Speed({ speed }) {
  const parts = [];
  if (speed.prefill_tps) parts.push(`${t("prefill")} ${count(speed.prefill_tps)} ${t("tokens/s")}`);
  if (speed.step_ms) parts.push(`${t("decode step")} ${seconds(speed.step_ms / 1000)}`);
  if (speed.tokens_per_s) parts.push(`${count(speed.tokens_per_s)} ${t("tokens/s")}`);
  if (!parts.length) return null;
  return html`<dt>${t("speed")}</dt><dd>${parts.join(", ")} <span class="soft">(${speed.source || "–"})</span></dd>`;
}
