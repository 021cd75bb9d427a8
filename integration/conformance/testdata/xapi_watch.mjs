// Drives npm xen-api, the layer of Xen Orchestra that talks to XAPI: connect, mirror everything, barrier, calls, events.
// Arguments: URL of the library's index.mjs, URL of the pool, transport, ref of a halted VM, ref of an SR. Prints one JSON object.
import { once } from 'node:events'

const [library, url, transport, vm, sr] = process.argv.slice(2)
const { createClient } = await import(library)

const xapi = createClient({
  url,
  auth: { user: 'root', password: 'secret' },
  allowUnauthorized: true,
  transport,
  debounce: 20,
})

// A task settles on the event of a change, so a watcher that is set up first cannot miss it.
const changed = (event, test) =>
  new Promise(resolve => {
    const look = items => {
      const found = Object.values(items).find(test)
      if (found !== undefined) {
        xapi.objects.removeListener(event, look)
        resolve(found)
      }
    }
    xapi.objects.on(event, look)
  })

await xapi.connect()
await xapi.objectsFetched

const counts = {}
for (const object of Object.values(xapi.objects.all)) {
  counts[object.$type] = (counts[object.$type] ?? 0) + 1
}
const out = { counts, pool: xapi.pool.name_label }
const record = xapi.getObjectByRef(vm)
out.types = Object.fromEntries(
  ['name_label', 'memory_static_max', 'is_a_template', 'HVM_shadow_multiplier', 'snapshot_time', 'other_config', 'VBDs'].map(k => [k, typeof record[k]])
)
out.values = [record.memory_static_max, record.is_a_template, record.HVM_shadow_multiplier, record.snapshot_time, record.name_description]

await xapi.barrier()

let event = changed('update', o => o.$ref === vm && o.name_description === 'é <seen> & "quoted"')
await xapi.setField('VM', vm, 'name_description', 'é <seen> & "quoted"')
await event
await xapi.setFieldEntry('VM', vm, 'other_config', 'a', 'b')

event = changed('update', o => o.$ref === vm && o.power_state === 'Running')
out.start = await xapi.callAsync('VM.start', vm, false, false)
await event

out.failure = await xapi.callAsync('VM.start', vm, false, false).catch(e => ({ code: e.code, params: e.params }))
out.bad = await xapi.call('VM.get_record', 'OpaqueRef:none').catch(e => ({ code: e.code, params: e.params }))

event = changed('add', o => o.$type === 'VDI' && o.name_label === 'disk')
const vdi = await xapi.call('VDI.create', {
  name_label: 'disk', name_description: '', SR: sr, virtual_size: 1073741824, type: 'user', sharable: false, read_only: false, other_config: {},
})
out.vdiSize = (await event).virtual_size
out.snapshot = await xapi.callAsync('VDI.snapshot', vdi)

event = changed('remove', () => true)
await xapi.call('VDI.destroy', vdi)
await xapi.barrier()
out.gone = xapi.getObjectByRef(vdi, undefined) === undefined

const disconnected = once(xapi, 'disconnected')
await xapi.disconnect()
await disconnected
console.log(JSON.stringify(out))
