// What is served, and by whom.
import { html } from "../vendor/preact.js";
import { count, t } from "../words.js";
import { Replicas } from "./groups.js";

export function Models({ mesh }) {
  const { models, instances, groups } = mesh.state;
  if (!models.length && !instances.length) {
    return html`<p class="soft">${t("No instance is registered yet. `infermesh up` starts a mesh; `infermesh llm --registry …` adds an instance.")}</p>`;
  }
  return ["llm", "embedding", "rerank"].map((kind) => {
    const found = models.filter((model) => model.kind === kind);
    return found.length > 0 && html`<section aria-label=${kind}>
      <h2>${kind}</h2>
      <div class="grid">${found.map((model) => html`<${Model} key=${model.id} model=${model} instances=${instances} groups=${groups} />`)}</div>
    </section>`;
  });
}

function Model({ model, instances, groups }) {
  const behind = model.variants.map(([id]) => id);
  const own = instances.filter((one) => one.kind === model.kind && (one.model === model.id || behind.includes(one.model)));
  const scaled = groups.filter((one) => one.kind === model.kind && (one.model === model.id || behind.includes(one.model)));
  const running = own.reduce((sum, one) => sum + (one.running || 0), 0);
  return html`<article class="card">
    <h3>${model.id}</h3>
    <dl class="facts small">
      ${model.aliases.length > 0 && html`<dt>${t("aliases")}</dt><dd>${model.aliases.join(", ")}</dd>`}
      ${model.variants.length > 0 && html`<dt>${t("variants")}</dt><dd>${model.variants.map(([id, weight]) => html`<span class="chip">${id} × ${weight}</span>`)}</dd>`}
      ${model.context_max > 0 && html`<dt>${t("context")}</dt><dd>${count(model.context_max)} ${t("tokens")}</dd>`}
      ${model.fallback && html`<dt>${t("falls back to")}</dt><dd>${model.fallback}</dd>`}
      <dt>${t("running")}</dt><dd>${running}</dd>
      ${scaled.length > 0 && html`<dt>${t("replicas")}</dt><dd>${scaled.map((one) => html`<span class="chip" title=${one.why}>${one.name} <${Replicas} one=${one} /></span>`)}</dd>`}
      <dt>${t("served by")}</dt>
      <dd>${own.length ? own.map((one) => html`<span class="chip"><a href="#resources/${one.id}">${one.id}</a> <span class="state ${one.state}">${one.state}</span></span>`) : t("nobody serves it right now")}</dd>
    </dl>
  </article>`;
}
