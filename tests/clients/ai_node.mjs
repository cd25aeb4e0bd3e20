// Vercel's AI SDK as a consumer: texts and streams, tools in steps, objects whole and in parts, embeddings, errors, aborts.

import assert from "node:assert/strict";
import { setTimeout as pause } from "node:timers/promises";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embedMany, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const [MODEL, TINY, SLOW, ENCODER] = ["smollm2-135m-instruct", "tiny", "slow", "all-minilm-l6-v2"];
const prompt = "What is the capital of France?";
const ANSWER = "The capital of France is Paris.";

const Weather = z.object({ city: z.string().max(20), unit: z.enum(["celsius", "kelvin"]) });
const City = z.object({ name: z.string().max(20), is_capital: z.boolean() });

const baseURL = process.env.OPENAI_BASE_URL;
const apiKey = process.env.OPENAI_API_KEY;
const served = createOpenAICompatible({ name: "lmx", baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: true });
const asked = (model) => ({ model: served(model), prompt, temperature: 0, maxRetries: 0 });

async function checkIdle() {
  const deadline = Date.now() + 10_000;
  for (;;) {
    const status = await (await fetch(baseURL.replace(/\/v1$/, "/admin/status"))).json();
    if (status.requests_running + status.requests_waiting === 0) return;
    assert.ok(Date.now() < deadline, "a request still runs");
    await pause(20);
  }
}

async function chat() {
  const whole = await generateText(asked(MODEL));
  assert.deepEqual([whole.text, whole.finishReason], [ANSWER, "stop"]);
  const streamed = streamText(asked(MODEL));
  let text = "";
  for await (const delta of streamed.textStream) text += delta;
  assert.equal(text, ANSWER);
  for (const usage of [whole.usage, await streamed.usage]) assert.deepEqual([usage.inputTokens, usage.outputTokens], [37, 8]);
}

async function toolCalls() {
  const inputs = [];
  const get_weather = tool({ inputSchema: Weather, execute: async (input) => (inputs.push(input), `290 ${input.unit}`) });
  const body = { ...asked(TINY), tools: { get_weather } };
  const whole = await generateText({ ...body, toolChoice: "required", stopWhen: stepCountIs(2) });
  assert.deepEqual([whole.steps.length, whole.finishReason], [2, "tool-calls"]);
  const streamed = streamText({ ...body, toolChoice: { type: "tool", toolName: "get_weather" } });
  assert.equal((await streamed.toolCalls).length, 1);
  assert.equal(inputs.length, 3);
  inputs.forEach((input) => Weather.parse(input));
}

async function objects() {
  City.parse((await generateObject({ ...asked(TINY), schema: City })).object);
  const streamed = streamObject({ ...asked(TINY), schema: City });
  let parts = 0;
  for await (const _ of streamed.partialObjectStream) parts += 1;
  City.parse(await streamed.object);
  assert.ok(parts > 1);
}

async function others() {
  const { embeddings } = await embedMany({ model: served.embeddingModel(ENCODER), values: ["a ship", "a boat"] });
  assert.deepEqual(embeddings.map((vector) => vector.length), [384, 384]);
  const unknown = (error) => APICallError.isInstance(error) && error.statusCode === 404 && !error.isRetryable;
  await assert.rejects(generateText(asked("no-such-model")), unknown);
}

async function leaveEarly() {
  const leaving = new AbortController();
  const many = Array.from({ length: 1000 }, (_, number) => `w${number}`).join(" ");
  const streamed = streamText({ ...asked(SLOW), prompt: many, abortSignal: leaving.signal });
  for await (const _ of streamed.textStream) {
    leaving.abort();
    break;
  }
  await checkIdle();
}

for (const check of [chat, toolCalls, objects, others, leaveEarly]) await check();
