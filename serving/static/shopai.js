// shopai.js tells a shop's API what its visitors look at. Consent first: before shopai.consent({analytics: true}) nothing is stored and nothing is sent.
//
//   <script src="/v1/shopai.js" data-view-item="85123A"></script>      a product page; an empty data-view-item takes the Product of the page's JSON-LD
//   shopai.consent({analytics: true, personalisation: false})          the visitor's answer: say it on each page; {analytics: false} withdraws it
//   shopai.track("add_to_cart", {items: [{item_id: "85123A", quantity: 2, price: 2.55}], currency: "GBP"})
//
// Do Not Track and Global Privacy Control count as a refusal, whatever is answered. data-endpoint names another address than the one beside the script.
(() => {
  "use strict";
  const script = document.currentScript;
  const own = script.dataset.endpoint;
  const endpoint = new URL(own || "events", own ? document.baseURI : script.src).href;
  const GAP = 30 * 60000;                     // a pause this long (ms) ends a session
  const EVERY = 2000, SLOWEST = 60000;        // events are sent this often (ms); how far failures may slow it down
  const MOST = 500, LONGEST = 30000;          // events and bytes of a request: a browser lets 64 KiB outlive a page
  const UNASKED = 100, KEPT = 1000;           // events kept in memory before the visitor has answered, and after; the oldest give way
  let consent = null;                         // null: not asked yet; false: refused
  let queue = [], most = MOST, pause = EVERY, timer = 0, busy = false, age = 0, memory = {};

  const warn = (...words) => console.warn("shopai:", ...words);
  const objects = () => navigator.globalPrivacyControl === true || navigator.doNotTrack === "1";
  const uuid = () => crypto.randomUUID ? crypto.randomUUID()   // plain http has none
    : Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("");

  // Two ids in localStorage; where it is blocked, in memory.
  const read = key => { try { return memory[key] || localStorage.getItem(key); } catch { return null; } };
  const write = (key, text) => { try { localStorage.setItem(key, text); } catch { memory[key] = text; } };
  const forget = () => {
    consent = false; queue = []; memory = {}; age++;
    clearTimeout(timer); timer = 0;
    try { ["shopai.visitor", "shopai.session"].forEach(key => localStorage.removeItem(key)); } catch { /* nothing was kept */ }
  };

  const identified = event => {
    const now = Date.parse(event.event_time), visitor = read("shopai.visitor") || uuid();
    let [session, last] = (read("shopai.session") || " 0").split(" ");
    if (!session || now - last > GAP) session = uuid();
    write("shopai.visitor", visitor);
    write("shopai.session", `${session} ${Math.max(now, last)}`);
    return {...event, anonymous_id: visitor, session_id: session, consent};
  };

  const plan = () => { if (!timer && !busy && queue.length) timer = setTimeout(send, pause); };
  const take = () => {                        // as many events as a request may hold, and the request; text/plain needs no question beforehand (CORS)
    for (let n = Math.min(most, queue.length); ; n = n >> 1) {
      const blob = new Blob([JSON.stringify({events: queue.slice(0, n), sent_at: new Date().toISOString()})], {type: "text/plain"});
      if (n < 2 || blob.size <= LONGEST) return [queue.splice(0, n), blob];
    }
  };
  const back = (batch, born) => { if (born === age) queue = batch.concat(queue).slice(-KEPT); };

  const send = async () => {
    timer = 0;
    if (busy || !consent || !queue.length) return;
    busy = true;
    const born = age, [batch, blob] = take();
    let status = 0, wait = 0, told = {};
    try {
      const answer = await fetch(endpoint, {method: "POST", body: blob, keepalive: blob.size <= LONGEST});
      status = answer.status;
      wait = answer.headers.get("Retry-After") * 1000 || 0;
      told = await answer.json();
    } catch { /* no answer, or none in JSON */ }
    busy = false;
    if (status === 413 && batch.length > 1) { most = batch.length >> 1; back(batch, born); }
    else if (!status || status === 429 || status >= 500) {
      back(batch, born);                      // the ids of the events stay, so what was kept after all is recognised
      pause = Math.max(wait, Math.min(2 * pause, SLOWEST)) * (1 + Math.random() / 4);
    } else {
      pause = EVERY;
      if (status !== 202) warn(`${batch.length} events dropped, status ${status}:`, told.detail);
      else if (told.refused) warn(`${told.refused} events refused:`, ...told.events.map(verdict => verdict.reason).filter(Boolean));
    }
    plan();
  };

  const leave = () => {                       // the page may be gone in a moment
    while (consent && queue.length) {
      const born = age, [batch, blob] = take();
      if (!navigator.sendBeacon?.(endpoint, blob)) { back(batch, born); return plan(); }
    }
  };

  const track = (name, fields = {}) => {
    if (consent === false || objects()) return;
    const event = {event_id: uuid(), event_name: name, event_time: new Date().toISOString(),
      timezone: Intl.DateTimeFormat().resolvedOptions().timeZone, ...structuredClone(fields)};
    queue.push(consent ? identified(event) : event);
    queue = queue.slice(consent ? -KEPT : -UNASKED);
    if (consent) plan();
  };

  const look = () => {
    const sku = script.dataset.viewItem;
    if (sku) track("view_item", {items: [{item_id: sku}]});
    else if (sku === "") for (const block of document.querySelectorAll('script[type="application/ld+json"]')) try {
      const found = JSON.parse(block.textContent), product = [].concat(found["@graph"] || found).find(thing => thing["@type"] === "Product" && thing.sku);
      if (!product) continue;
      const offer = [].concat(product.offers)[0] || {};
      return track("view_item", {items: [{item_id: `${product.sku}`, price: +offer.price || undefined}], currency: offer.priceCurrency});
    } catch { /* somebody else's markup */ }
  };

  window.shopai = {
    track,
    consent(answer) {
      if (!answer || answer.analytics !== true || objects()) return forget();
      const unasked = !consent;
      consent = {analytics: true, personalisation: answer.personalisation === true};
      if (unasked) queue = queue.map(identified);
      plan();
    },
  };
  addEventListener("storage", change => { if (change.key === "shopai.visitor" && !change.newValue) forget(); });   // withdrawn in another tab
  addEventListener("pagehide", leave);
  document.addEventListener("visibilitychange", () => { if (document.visibilityState === "hidden") leave(); });
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", look); else look();
})();
