// The frame: one connection to the gateway, four pages.
import { html, render, useEffect, useRef, useState } from "./vendor/preact.js";
import { call, events, keep, key, Refused } from "./api.js";
import { language, speak, t } from "./words.js";
import { Models } from "./pages/models.js";
import { Resources } from "./pages/resources.js";
import { Routing } from "./pages/routing.js";
import { Playground } from "./pages/playground.js";

const PAGES = [["models", "Models", Models], ["resources", "Resources", Resources], ["routing", "Routing", Routing], ["playground", "Playground", Playground]];
const KEPT = 300; // requests in the page
const here = () => PAGES.some(([name]) => `#${name}` === location.hash.split("/")[0]) ? location.hash.slice(1) : "models";

// Follows the gateway for as long as the page is open; comes back by itself.
function useMesh(wanted) {
  const [mesh, set] = useState({ state: null, requests: [], link: "connecting…", refused: null });
  useEffect(() => {
    const stop = new AbortController();
    (async () => {
      let pause = 500;
      while (!stop.signal.aborted) {
        try {
          const reply = await call("api/events", { signal: stop.signal });
          set((old) => ({ ...old, link: "live", refused: null, requests: [] }));
          for await (const { event, data } of events(reply)) {
            pause = 500;
            const told = JSON.parse(data);
            if (event === "state") set((old) => ({ ...old, state: told }));
            else if (event === "requests") set((old) => ({ ...old, requests: [...told.reverse(), ...old.requests].slice(0, KEPT) }));
          }
        } catch (error) {
          if (stop.signal.aborted) return;
          if (error instanceof Refused && error.status === 401) {
            set((old) => ({ ...old, link: "not connected", refused: error.message }));
            return;
          }
        }
        set((old) => ({ ...old, link: "not connected" }));
        await new Promise((done) => setTimeout(done, pause));
        pause = Math.min(pause * 2, 5000);
      }
    })();
    return () => stop.abort();
  }, [wanted]);
  return mesh;
}

function KeyDoor({ why, enter }) {
  const box = useRef();
  useEffect(() => box.current.showModal(), []);
  const done = (event) => {
    event.preventDefault();
    keep(new FormData(event.target).get("key").trim());
    enter();
  };
  return html`<dialog ref=${box} onCancel=${(event) => event.preventDefault()}>
    <form onSubmit=${done}>
      <h2>${t("This gateway wants an API key")}</h2>
      ${key() && html`<p class="fault">${why}</p>`}
      <label for="key">${t("API key")}</label>
      <input id="key" name="key" type="password" autocomplete="off" required autofocus />
      <p class="soft small">${t("It stays in this tab only.")}</p>
      <button class="main">${t("enter")}</button>
    </form>
  </dialog>`;
}

function App() {
  const [page, go] = useState(here());
  const [visit, again] = useState(0); // another key, another connection
  const [, redraw] = useState(0);
  const mesh = useMesh(visit);
  useEffect(() => {
    const moved = () => go(here());
    const pressed = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
      const wanted = PAGES[Number(event.key) - 1];
      if (wanted) location.hash = wanted[0];
    };
    addEventListener("hashchange", moved);
    addEventListener("keydown", pressed);
    return () => { removeEventListener("hashchange", moved); removeEventListener("keydown", pressed); };
  }, []);
  const other = language() === "zh" ? "en" : "zh";
  const change = () => { speak(other); redraw((n) => n + 1); };
  const [name] = page.split("/");
  const Page = PAGES.find(([one]) => one === name)[2];
  const { state, link } = mesh;
  return html`
    <header>
      <h1><img src="icon.svg" alt="" />infermesh</h1>
      <nav aria-label="pages">
        ${PAGES.map(([one, title], at) => html`<a href="#${one}" aria-current=${one === name ? "page" : undefined}>${t(title)}<kbd>${at + 1}</kbd></a>`)}
      </nav>
      <span class="small soft" role="status" data-link=${link}>
        <span class="state ${link === "live" ? "healthy" : "suspect"}">${t(link)}</span>
        ${state && html` · ${state.gateway.id} · ${t("in flight")} ${state.gateway.in_flight} · ${t("waiting")} ${state.gateway.waiting}`}
      </span>
      <button class="plain" onClick=${change} lang=${other}>${other === "zh" ? "中文" : "English"}</button>
      ${key() && html`<button class="plain" onClick=${() => { keep(""); again(visit + 1); }}>${t("other key")}</button>`}
    </header>
    ${mesh.refused && html`<${KeyDoor} why=${mesh.refused} enter=${() => again(visit + 1)} />`}
    <main>
      ${state?.gateway.registry_stale && html`<p class="notice">${t("registry out of reach: last known instances")}</p>`}
      ${state ? html`<${Page} mesh=${mesh} at=${page} />` : html`<p class="soft">${t(link)}</p>`}
    </main>`;
}

speak(language());
render(html`<${App} />`, document.getElementById("app"));
