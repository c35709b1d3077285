// Shows a node's text output (cards, scores, reports) in the node itself.
// Served as /extensions/<pack>/js/text.js, three folders below the front end's scripts.
import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";

const WIDGET = "dgpo_text";

function show(node, text) {
  let widget = node.widgets?.find((candidate) => candidate.name === WIDGET);
  if (!widget) {
    widget = ComfyWidgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app).widget;
    widget.serialize = false; // not an input of the node
    widget.options.serialize = false;
    if (widget.inputEl) widget.inputEl.readOnly = true;
    const [width, height] = text.split("\n").length > 3 ? [420, 260] : node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  }
  widget.value = text;
  app.graph.setDirtyCanvas(true);
}

app.registerExtension({
  name: "dgpo.text",
  async beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("DGPO")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      before?.apply(this, arguments);
      if (message?.text) show(this, message.text.join("\n"));
    };
  },
});
