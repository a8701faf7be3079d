// node bundle.mjs FOLDER: make FOLDER/main.jsx or main.js, and all that it imports, one script for a browser, FOLDER/bundle.js.

import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";

import { build } from "esbuild";
import { compileScript, parse } from "vue/compiler-sfc";

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const folder = process.argv[2];

const components = {
  name: "vue",
  setup({ onLoad }) {
    onLoad({ filter: /\.vue$/ }, async ({ path }) => {
      const { descriptor, errors } = parse(await readFile(path, "utf8"), { filename: path });
      if (errors.length) throw errors[0];
      return { contents: compileScript(descriptor, { id: path, inlineTemplate: true }).content, loader: "js" };
    });
  },
};

const { warnings } = await build({
  entryPoints: [["main.jsx", "main.js"].map((name) => `${folder}/${name}`).find(existsSync)],
  outfile: `${folder}/bundle.js`,
  bundle: true,
  format: "esm",
  jsx: "automatic",
  charset: "utf8",
  nodePaths: [here("node_modules")],
  alias: { quotepush: here("../../quotepush/static/quotepush.js") },
  // As while somebody develops: React then runs each effect twice.
  define: {
    "process.env.NODE_ENV": '"development"',
    __VUE_OPTIONS_API__: "true",
    __VUE_PROD_DEVTOOLS__: "false",
    __VUE_PROD_HYDRATION_MISMATCH_DETAILS__: "false",
  },
  plugins: [components],
});
if (warnings.length) throw new Error(warnings[0].text);
