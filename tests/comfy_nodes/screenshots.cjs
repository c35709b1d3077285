// screenshots.cjs NODE_MODULES CHROMIUM ADDRESS WORKFLOW FOLDER: see screenshots.py.
const fs = require("fs");
const path = require("path");
const [modules, executablePath, address, workflow, folder] = process.argv.slice(2);
const { chromium } = require(path.join(modules, "playwright-core"));

const QUIET = 1500; // ms for the canvas to be drawn

async function main() {
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  const page = await browser.newPage({ viewport: { width: 2300, height: 1200 } });
  const picture = (name) => page.screenshot({ path: path.join(folder, `${name}.png`) });
  const widget = (kind, name) =>
    page.evaluate(
      ([kind, name]) =>
        app.graph._nodes.find((node) => node.type === kind)?.widgets?.find((w) => w.name === name)?.value,
      [kind, name],
    );
  const lookAt = async (kind, scale, left, top) => {
    await page.evaluate(
      ([kind, scale, left, top]) => {
        const node = app.graph._nodes.find((candidate) => candidate.type === kind);
        app.canvas.selectNode(node);
        app.canvas.ds.scale = scale;
        app.canvas.ds.offset = [left - node.pos[0], top - node.pos[1]];
        app.graph.setDirtyCanvas(true, true);
      },
      [kind, scale, left, top],
    );
    await page.waitForTimeout(QUIET);
  };

  await page.goto(address);
  await page.waitForFunction(() => window.app?.graph && window.app?.extensionManager, null, { timeout: 60000 });
  await page.waitForTimeout(2 * QUIET);
  await page.keyboard.press("Escape"); // the templates that a first start offers
  await page.evaluate(() => app.graph.clear());

  await page.getByText("Nodes", { exact: true }).first().click();
  await page.locator('input[placeholder*="earch"]').first().click();
  await page.keyboard.type("DGPO", { delay: 40 });
  await page.getByText("Train DGPO adapter").first().waitFor();
  await page.waitForTimeout(QUIET);
  await picture("menu");
  await page.getByText("Nodes", { exact: true }).first().click();

  const dropped = await page.evaluateHandle(([name, text]) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name, { type: "application/json" }));
    return data;
  }, [path.basename(workflow), fs.readFileSync(workflow, "utf8")]);
  const canvas = page.locator("#graph-canvas");
  for (const event of ["dragover", "drop"]) {
    await canvas.dispatchEvent(event, { dataTransfer: dropped, clientX: 1200, clientY: 600, bubbles: true });
  }
  await page.waitForFunction(() => app.graph._nodes.some((node) => node.type === "DGPOCompareAdapter"));
  await page.waitForTimeout(QUIET);

  await page.evaluate(() => app.queuePrompt(0, 1));
  const text = () => widget("DGPOCompareAdapter", "dgpo_text");
  for (let waited = 0; !(await text()); waited++) {
    if (waited > 120) throw new Error("the workflow did not run");
    await page.waitForTimeout(1000);
  }
  const card = await widget("DGPOAdapterCard", "dgpo_text");
  if (!card?.includes("reward after")) throw new Error(`the card is not shown: ${card}`);
  await page.waitForTimeout(2 * QUIET);
  await page.mouse.move(1500, 1100);
  await page.keyboard.press("."); // fit the view
  await page.waitForTimeout(QUIET);
  await picture("workflow");

  await lookAt("DGPOAdapterCard", 1.4, 200, 120);
  await picture("card");
  await lookAt("DGPOLoadAdapter", 0.9, 700, 150);
  await page.locator('[data-testid="info-button"]').first().click();
  await page.getByRole("heading", { name: "Load DGPO adapter", exact: true }).waitFor();
  await page.waitForTimeout(QUIET);
  await picture("help");
  await browser.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
