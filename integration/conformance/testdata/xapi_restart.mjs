// npm xen-api across a restart of XAPI: it must log in again, fetch everything again, and notice what went meanwhile.
// Arguments: URL of the library's index.mjs, URL of the pool, transport, ref of a VM that changes, ref of a VM that goes. Prints "synced", then "seen".
const [library, url, transport, vm, gone] = process.argv.slice(2)
const { createClient } = await import(library)

const xapi = createClient({ url, auth: { user: 'root', password: 'secret' }, transport, debounce: 20 })
await xapi.connect()
await xapi.objectsFetched
if (xapi.getObjectByRef(gone, undefined) === undefined) {
  throw new Error('the first sync is not complete')
}
const seen = new Promise(resolve => {
  const look = () => {
    if (xapi.getObjectByRef(vm).name_description === 'after' && xapi.getObjectByRef(gone, undefined) === undefined) {
      resolve()
    }
  }
  xapi.objects.on('update', look)
  xapi.objects.on('remove', look)
})
console.log('synced')
await seen
console.log('seen')
process.exit(0)
