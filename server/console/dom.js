// Making elements. Strings only ever become text nodes or attribute values: labels, set names and error texts are
// data, whatever they look like.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element. `properties` are set as properties, except `dataset`, `style` (CSS properties by name) and those
 * whose name has a dash (`aria-label`), which become attributes. Children are nodes or strings.
 */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "dataset") Object.assign(node.dataset, value);
    else if (name === "style") for (const [property, text] of Object.entries(value)) node.style.setProperty(property, text);
    else if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

/** Sets the text of a node, leaving it alone when it says so already: screen readers announce every change. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Shows or hides the message beside an action: `kind` is "error", "ok" or "" for none. */
export function notify(node, kind, text = "") {
  node.dataset.kind = kind;
  say(node, text);
}

/** Keeps `parent`'s children in step with `items`, reusing the child of each key so that focus and hover survive. */
export function keep(parent, items, keyOf, create, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = known.get(key);
    known.delete(key);
    if (!child) {
      child = create(item);
      child.dataset.key = key;
    }
    update(child, item);
    if (child === next) next = next.nextElementSibling;
    else parent.insertBefore(child, next);
  }
  for (const child of known.values()) child.remove();
}
