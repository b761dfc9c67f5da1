// node-postgres with pg-copy-streams.
'use strict';

const fs = require('node:fs');
const { Readable } = require('node:stream');
const { pipeline } = require('node:stream/promises');
const { setTimeout: sleep } = require('node:timers/promises');
const { Client } = require('pg');
const copy = require('pg-copy-streams');

const ROW = 'x'.repeat(10_000) + '\n';

function settings() {
  const verified = process.env.PGSSLMODE === 'verify-full';
  return { ssl: verified ? { ca: fs.readFileSync(process.env.PGSSLROOTCERT) } : false };
}

async function connect() {
  const client = new Client(settings());
  // What ends the session is told to whoever waits for an answer; without a listener it would end this program.
  client.on('error', () => {});
  await client.connect();
  return client;
}

async function one(client, sql, values) {
  return Object.values((await client.query(sql, values)).rows[0])[0];
}

// A session for the time of one step.
async function session(work) {
  const client = await connect();
  try {
    return await work(client);
  } finally {
    client.end().catch(() => {});
  }
}

async function* held() {
  for (;;) {
    yield ROW;
    await sleep(50);
  }
}

const steps = {
  role: () => session(async (c) => ((await one(c, 'SELECT pg_is_in_recovery()')) ? 'standby' : 'primary')),
  tls: () =>
    session(async (c) => ((await one(c, 'SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()')) ? 'on' : 'off')),
  large: () => session(async (c) => (await one(c, 'SELECT $1::text', ['x'.repeat(16 << 20)])).length),
  'copy-out': () =>
    session(async (c) => {
      let bytes = 0;
      for await (const data of c.query(copy.to('COPY (SELECT generate_series(1, 100000)) TO STDOUT'))) bytes += data.length;
      return bytes;
    }),
  'copy-in': () =>
    session(async (c) => {
      await c.query('CREATE TEMPORARY TABLE numbers (n int)');
      const lines = Array.from({ length: 100_000 }, (_, i) => `${i + 1}\n`).join('');
      await pipeline(Readable.from([lines]), c.query(copy.from('COPY numbers FROM STDIN')));
      return one(c, 'SELECT sum(n) FROM numbers');
    }),
  cancel: () =>
    session(async (c) => {
      const asleep = c.query('SELECT pg_sleep(60)').then(
        () => 'finished',
        (error) => error.code,
      );
      // A request may overtake the query that it is meant for.
      for (;;) {
        const answer = await Promise.race([asleep, sleep(300)]);
        if (answer !== undefined) return answer;
        await cancel(c);
      }
    }),
  listen: () =>
    session(async (c) => {
      const heard = new Promise((resolve) => c.on('notification', (message) => resolve(message.payload)));
      await c.query('LISTEN node');
      await session((other) => other.query("NOTIFY node, 'hello'"));
      return heard;
    }),
};

// node-postgres keeps this to itself, but it is there: another client sends the request and is closed.
function cancel(client) {
  return new Promise((resolve) => {
    const other = new Client(settings());
    const { connection } = other;
    const { host, port } = client;
    connection.on('error', resolve);
    connection.on('end', resolve);
    connection.on(settings().ssl ? 'sslconnect' : 'connect', () => connection.cancel(client.processID, client.secretKey));
    connection.connect(port, host);
    if (settings().ssl) connection.on('connect', () => connection.requestSsl());
  });
}

const holds = {
  'hold-query': async (c, waiting) => {
    waiting();
    await c.query('SELECT pg_sleep(600)');
  },
  'hold-copy-in': async (c, waiting) => {
    await c.query('CREATE TEMPORARY TABLE lines (line text)');
    waiting();
    await pipeline(Readable.from(held()), c.query(copy.from('COPY lines FROM STDIN')));
  },
  'hold-copy-out': async (c, waiting) => {
    waiting();
    const sql = 'COPY (SELECT i, pg_sleep(0.05) FROM generate_series(1, 10000) i) TO STDOUT';
    for await (const _ of c.query(copy.to(sql)));
  },
  'hold-listen': async (c, waiting) => {
    await c.query('LISTEN node_held');
    waiting();
    await new Promise((_, reject) => c.on('error', reject));
  },
};

const say = (step, answer) => console.log(`${step}: ${answer}`);

async function hold(step) {
  const client = await connect();
  const waiting = () => say(step, 'waiting');
  try {
    await holds[step](client, waiting);
    say(step, 'finished');
  } catch {
    say(step, 'ended');
  }
  say(step, await steps.role());
}

async function main() {
  for (const step of process.argv.slice(2)) {
    try {
      await (step in holds ? hold(step) : steps[step]().then((answer) => say(step, answer)));
    } catch (error) {
      say(step, `${error.code} ${error.message}`);
    }
  }
  process.exit(0);
}

main();
