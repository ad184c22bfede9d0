// Groups of like instances that are scaled: how many there are and should be.
import { html } from "../vendor/preact.js";
import { percent, t } from "../words.js";

// Both numbers where they differ.
export function Replicas({ one }) {
  if (!one.desired || one.desired === one.replicas) return html`<b>${one.replicas}</b>`;
  return html`<b class="changing" title="${one.replicas} ${t("present")}, ${one.desired} ${t("wanted")}">${one.replicas} → ${one.desired}</b>`;
}

export function Groups({ groups }) {
  if (!groups.length) return null;
  return html`<section aria-label="groups">
    <h2>${t("Scaled groups")}</h2>
    <div class="scroll"><table>
      <thead><tr><th>${t("group")}</th><th>${t("model")}</th><th class="number">${t("replicas")}</th><th class="number">${t("bounds")}</th><th>${t("in use")}</th><th>${t("why")}</th></tr></thead>
      <tbody>${groups.map((one) => html`<tr key=${one.name} data-group=${one.name}>
        <td>${one.name}</td><td>${one.model || "–"}</td>
        <td class="number"><${Replicas} one=${one} /></td>
        <td class="number">${one.least}–${one.most}</td>
        <td>${one.short ? `${percent(one.use)} ${t(one.short)}` : "–"}</td>
        <td class="wide">${one.desired ? one.why : t("no opinion yet")}</td>
      </tr>`)}</tbody>
    </table></div>
  </section>`;
}
